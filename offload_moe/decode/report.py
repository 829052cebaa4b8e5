"""Which decoder layers take the fast path, and why others do not."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from offload_moe.decode.layer import LayerParts, LayerStep
from offload_moe.decode.probe import Uncovered
from offload_moe.experts.attach import BoundExperts
from offload_moe.families.layer_spec import LayerSpec
from offload_moe.families.limits import attention_limits, order_limits, router_limits
from offload_moe.families.read_layer import layer_spec

Kind = Literal["span", "layer", "modules"]
DENSE = ("a dense MLP",)  # between spans: attention and MLP are native calls


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPath:
    """How a decode step goes through one layer.

    kind: "span": natively, with the layers beside it; "layer": attention and norms are one native call, and the MLP or
    the experts are called from Python; "modules": the layer's own code calls its parts. reasons: why it is no span.
    """

    name: str
    kind: Kind
    reasons: tuple[str, ...] = ()


def tell_reasons(layers: Iterable[tuple[str, ...]]) -> str:
    """The reasons of some layers in words, and how many have each."""
    return "; ".join(f"{count} with {' and '.join(reasons)}" for reasons, count in Counter(layers).items())


def layer_paths(hf: nn.Module) -> tuple[LayerPath, ...]:
    """Of every decoder layer, once the model was made fast."""
    return tuple(_path(name, layer) for name, layer in decoder_layers(hf, _has_experts))


def decoder_layers(hf: nn.Module, has_experts: Callable[[nn.Module], bool]) -> Iterator[tuple[str, Any]]:
    """Names and modules of the layers of the stacks of which some layers have experts in them."""
    found: list[str] = []
    for name, stack in hf.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(stack, nn.ModuleList) and not is_inside and any(map(has_experts, stack)):
            found.append(name)
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(stack))


def _has_experts(layer: nn.Module) -> bool:
    return any(isinstance(vars(module).get("_offload_moe"), BoundExperts) for module in layer.modules())


def _path(name: str, layer: Any) -> LayerPath:
    step, spec = vars(layer).get("forward"), layer_spec(layer)
    if not isinstance(step, LayerStep):
        return LayerPath(name=name, kind="modules", reasons=tuple(_why_modules(layer, spec)))
    if step.run is not None:
        return LayerPath(name=name, kind="span")
    return LayerPath(name=name, kind="layer", reasons=tuple(_why_no_span(step, layer, spec)))


def _why_modules(layer: Any, spec: LayerSpec | None) -> list[str]:
    """What is declared; of a layer that could be a step, or is not declared, what was found."""
    reasons = [] if spec is None else [*attention_limits(spec.attention), *order_limits(spec)]
    if not reasons:
        try:
            LayerParts.of(layer)
        except Uncovered as reason:
            reasons = [str(reason)]
    return reasons or ["native calls that give other numbers than the layer on probes"]


def _why_no_span(step: LayerStep, layer: Any, spec: LayerSpec | None) -> list[str]:
    if step.plain is not None:
        return ["experts that are not computed out of slots in RAM by the native kernels"]
    if not _has_experts(layer):
        return list(DENSE)
    limits = [] if spec is None or spec.router is None else router_limits(spec.router)
    return limits or ["a router or a shared expert of another kind, or that gives other numbers on probes"]
