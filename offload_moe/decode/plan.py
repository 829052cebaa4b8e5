"""The plan of a token pass: native spans of layers, native layers, and layers that are called as modules.

A prompt takes the same plan, many rows at once, where no layer is called as a module: then each of its tokens has the
bits that it has alone, however the prompt is cut.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offload_moe.decode.cache import RoomyLayer
from offload_moe.decode.hooks import Bypass
from offload_moe.decode.layer import NativeLayer, RowsStep, check_layer
from offload_moe.decode.probe import Uncovered, structure
from offload_moe.decode.report import DENSE, LayerPath, has_experts
from offload_moe.decode.span import LayerSpan, span_kind
from offload_moe.decode.wiring import Wiring, wiring_of
from offload_moe.families.limits import router_limits
from offload_moe.families.read_layer import layer_spec
from offload_moe.residency.hierarchy import Hierarchy

Found = NativeLayer | tuple[str, ...]  # a layer, or why it is called as a module


class Stage(Protocol):
    """One or several layers."""

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        """Whether the cache can take the next tokens of them in place."""

    def __call__(self, x: Tensor, step: RowsStep) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""


class ModuleLayer:
    """A layer that is called as a module, without a mask: its cache, which grows, holds all that it sees.

    Row by row: more rows may change the bits of each.
    """

    def __init__(self, layer: Any, index: int) -> None:
        self._layer, self._index = layer, index

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        return self._index < len(cache.layers) and type(cache.layers[self._index]) is RoomyLayer

    def __call__(self, x: Tensor, step: RowsStep) -> Tensor:
        if step.num_rows == 1:
            return self._call(x, step)
        rows = zip(x.split(1, dim=1), step.rows, strict=True)
        return torch.cat([self._call(*row) for row in rows], dim=1)

    def _call(self, x: Tensor, step: RowsStep) -> Tensor:
        result = self._layer(
            x,
            attention_mask=None,
            position_ids=step.position_ids,
            past_key_values=step.caches[0],
            use_cache=True,
            position_embeddings=step.embeddings,
        )
        hidden: Tensor = result[0] if isinstance(result, tuple) else result
        return hidden


class PassPlan:
    """Takes some rows through all layers of a decoder: tokens of one sequence, one after the other, or of several.

    bypass: the modules that it does not call. takes_prompts: whether many rows may pass at once.
    """

    def __init__(self, wiring: Wiring, stages: Sequence[Stage], natives: Sequence[NativeLayer]) -> None:
        """natives: the layers of these stages that are no modules."""
        self.wiring = wiring
        self.bypass = Bypass(
            [module for native in natives for module in native.bypassed()],
            [hooks for native in natives for hooks in native.observed()],
        )
        self.stages = stages
        self.takes_prompts = not any(isinstance(stage, ModuleLayer) for stage in stages)
        self._natives = natives

    def begin(self, cache: Any) -> None:
        """Make the layers of a cache that has no tokens yet, where layers of ours are."""
        for native in self._natives:
            native.attention.begin(cache)

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        """Whether so many tokens of a sequence may be passed behind this cache."""
        return hasattr(cache, "layers") and all(stage.fits(cache, num_tokens) for stage in self.stages)

    def __call__(self, x: Tensor, step: RowsStep) -> Tensor:
        """``[1, T, H] -> [1, T, H]``, fp32 on the CPU: the bits of each row alone.

        T is at most `MAX_ROWS` unless it `takes_prompts`.

        Raises: TransferError, ModelClosed.
        """
        x = x.contiguous()
        for stage in self.stages:
            x = stage(x, step)
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan, and how it treats each layer.

    plan: None where no layer is native. paths: of every layer of the decoder.
    """

    plan: PassPlan | None
    paths: dict[nn.Module, LayerPath]


def plan_pass(hf: Any, hierarchy: Hierarchy | None) -> Planned:
    """The plan for the decoder of a model whose modules were made fast before. hierarchy: where its experts are."""
    decoder = hf.get_decoder()
    layers: list[Any] = list(getattr(decoder, "layers", ()))
    wiring: Wiring | Uncovered
    try:
        wiring = wiring_of(decoder)
    except Uncovered as reason:
        wiring = reason
    found = _native_layers(layers, wiring)
    natives = [each for each in found if isinstance(each, NativeLayer)]
    plan = None
    if natives:
        assert isinstance(wiring, Wiring)
        plan = PassPlan(wiring, list(stages_of(layers, found, hierarchy)), natives)
    spans = [] if plan is None else [stage for stage in plan.stages if isinstance(stage, LayerSpan)]
    spanned = {native for span in spans for native in span.layers}
    paths = {}
    for layer, each in zip(layers, found, strict=True):
        if not isinstance(each, NativeLayer):
            paths[layer] = LayerPath(kind="modules", reasons=each)
        elif each in spanned:
            paths[layer] = LayerPath(kind="span")
        else:
            paths[layer] = LayerPath(kind="layer", reasons=tuple(_why_no_span(each)))
    return Planned(plan=plan, paths=paths)


def _native_layers(layers: Iterable[Any], wiring: Wiring | Uncovered) -> list[Found]:
    """One layer of each kind is checked."""
    is_checked: dict[Hashable, Uncovered | None] = {}
    found = [_native_layer(layer, wiring, is_checked) for layer in layers]
    natives = [each for each in found if isinstance(each, NativeLayer)]
    rotaries = [native.rotary for native in natives if native.rotates]
    for native in natives:  # those that do not rotate are given what the others read
        native.rotary = rotaries[0] if rotaries else native.rotary
    return found


def _native_layer(layer: Any, wiring: Wiring | Uncovered, is_checked: dict[Hashable, Uncovered | None]) -> Found:
    spec = layer_spec(layer)
    if spec is None:
        return (f"a class that is not declared ({type(layer).__name__})",)
    try:
        native, kind = NativeLayer(layer, spec), structure(layer)
        if isinstance(wiring, Uncovered):
            raise wiring
        native.rotary = wiring.step_rotary(spec.attention.rotated_dims if native.rotates else 0)
        if kind not in is_checked:
            is_checked[kind] = _outcome(native, wiring)
        outcome = is_checked[kind]
        if outcome is not None:
            raise outcome
    except Uncovered as reason:
        return reason.reasons
    return native


def _outcome(native: NativeLayer, wiring: Wiring) -> Uncovered | None:
    try:
        check_layer(native, wiring.last_embeddings())
    except Uncovered as reason:
        return reason
    return None


def stages_of(layers: Sequence[Any], found: Sequence[Found], hierarchy: Hierarchy | None) -> Iterator[Stage]:
    """Native layers that follow each other and can be one span are one."""
    kind_of = partial(_span_kind, hierarchy)
    for kind, row in groupby(enumerate(found), key=lambda item: kind_of(item[1])):
        for index, each in row:
            if not isinstance(each, NativeLayer):
                yield ModuleLayer(layers[index], index)
            elif kind is None or hierarchy is None:
                yield each
            else:
                rest = [native for _, native in row if isinstance(native, NativeLayer)]
                yield LayerSpan([each, *rest], hierarchy)


def _span_kind(hierarchy: Hierarchy | None, each: Found) -> Hashable:
    return span_kind(hierarchy, each) if hierarchy is not None and isinstance(each, NativeLayer) else None


def _why_no_span(native: NativeLayer) -> list[str]:
    if native.plain is not None:
        return ["experts that are not computed out of slots in RAM by the native kernels"]
    if not has_experts(native.layer):
        return list(DENSE)
    limits = [] if native.spec.router is None else router_limits(native.spec.router)
    return limits or ["a router or a shared expert in a form that no kernel takes"]
