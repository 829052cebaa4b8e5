"""Which decoder layers take the fast path, and why others do not."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from offload_moe.experts.attach import bound_experts

Kind = Literal["span", "layer", "modules", "card"]
DENSE = ("a dense MLP",)  # between spans: attention and MLP are native calls


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPath:
    """How a decode step goes through one layer.

    kind: "span": natively, with the layers beside it; "layer": attention and norms are one native call, and the MLP or
    the experts are called from Python; "modules": the layer's own code calls its parts; "card": in the device pass.
    reasons: why it is no span.
    """

    kind: Kind
    reasons: tuple[str, ...] = ()
    name: str = ""


def tell_reasons(layers: Iterable[tuple[str, ...]]) -> str:
    """The reasons of some layers in words, and how many have each."""
    return "; ".join(f"{count} with {' and '.join(reasons)}" for reasons, count in Counter(layers).items())


def layer_paths(hf: nn.Module, planned: Mapping[nn.Module, LayerPath]) -> tuple[LayerPath, ...]:
    """Of every layer of the stacks that have experts. planned: those of the decoder."""
    return tuple(
        replace(planned.get(layer) or _unplanned(layer), name=name) for name, layer in decoder_layers(hf, has_experts)
    )


def _unplanned(layer: nn.Module) -> LayerPath:
    return LayerPath(kind="modules", reasons=(f"a class that is not declared ({type(layer).__name__})",))


def decoder_layers(hf: nn.Module, has_experts: Callable[[nn.Module], bool]) -> Iterator[tuple[str, Any]]:
    """Names and modules of the layers of the stacks of which some layers have experts in them."""
    found: list[str] = []
    for name, stack in hf.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(stack, nn.ModuleList) and not is_inside and any(map(has_experts, stack)):
            found.append(name)
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(stack))


def has_experts(layer: nn.Module) -> bool:
    """Whether routed experts of ours are in it."""
    return any(bound_experts(module) is not None for module in layer.modules())
