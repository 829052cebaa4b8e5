"""The plan of a token pass: native spans of layers, native layers, and layers that are called as modules.

A prompt takes the same plan, many rows at once, where no layer is called as a module or has linear attention: then each
of its tokens has the bits that it has alone, however the prompt is cut.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offload_moe.decode.cache import RoomyLayer
from offload_moe.decode.hooks import Bypass
from offload_moe.decode.layer import NativeLayer, RowsStep, check_layer
from offload_moe.decode.probe import Uncovered, structure
from offload_moe.decode.report import DENSE, LayerPath, has_experts
from offload_moe.decode.span import LayerSpan, span_kind
from offload_moe.decode.states import StatesLayer
from offload_moe.decode.wiring import Wiring, wiring_of
from offload_moe.families.cache_name import with_cache
from offload_moe.families.layer_spec import LayerSpec
from offload_moe.families.read_layer import layer_spec
from offload_moe.families.text_model import TextModel
from offload_moe.residency.hierarchy import Hierarchy

Found = NativeLayer | tuple[str, ...]  # a layer, or why it is called as a module


class Stage(Protocol):
    """One or several layers. They may overwrite what they are given, and nothing else refers to what they return."""

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
        layer = cache.layers[self._index] if self._index < len(cache.layers) else None
        return type(layer) is RoomyLayer or (type(layer) is StatesLayer and (num_tokens == 1 or layer.goes_back))

    def __call__(self, x: Tensor, step: RowsStep) -> Tensor:
        rows = zip(x.split(1, dim=1), step.rows, self._moves(step), strict=True)
        outs = [self._call(row, alone) for row, alone, _ in rows]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _moves(self, step: RowsStep) -> Iterator[None]:
        """An item before each row is computed."""
        for cache, num_rows in step.sequences:
            layer = cache.layers[self._index]
            yield from layer.rows(num_rows) if isinstance(layer, StatesLayer) else [None] * num_rows

    def _call(self, x: Tensor, step: RowsStep) -> Tensor:
        result = self._layer(
            x,
            attention_mask=None,
            position_ids=step.position_ids,
            **with_cache(step.caches[0]),
            use_cache=True,
            position_embeddings=step.embeddings,
        )
        hidden: Tensor = result[0] if isinstance(result, tuple) else result
        return hidden.clone(memory_format=torch.contiguous_format)


class PassPlan:
    """Takes some rows through all layers of a decoder: tokens of one sequence, one after the other, or of several.

    bypass: the modules that it does not call. takes_prompts: whether many rows may pass at once.
    """

    def __init__(self, wiring: Wiring, stages: Sequence[Stage], natives: Sequence[NativeLayer]) -> None:
        """natives: the layers of these stages that are no modules."""
        self.wiring = wiring
        self.bypass = Bypass(
            [*wiring.bypassed(), *(module for native in natives for module in native.bypassed())],
            [hooks for native in natives for hooks in native.observed()],
        )
        self.stages = stages
        has_modules = any(isinstance(stage, ModuleLayer) for stage in stages)
        self.takes_prompts = not has_modules and all(native.attention.takes_prompts for native in natives)
        self._natives = natives

    def begin(self, cache: Any) -> None:
        """Make the layers of a cache that has no tokens yet, where layers of ours are."""
        for native in self._natives:
            native.attention.begin(cache)

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        """Whether so many tokens of a sequence may be passed behind this cache."""
        return hasattr(cache, "layers") and all(stage.fits(cache, num_tokens) for stage in self.stages)

    def __call__(self, x: Tensor, step: RowsStep) -> Tensor:
        """``[1, T, H]``, overwritten -> ``[1, T, H]``, fp32 and contiguous.

        T is at most `MAX_ROWS` unless it `takes_prompts`. Each row has the bits that it would have alone.

        Raises: TransferError, ModelClosed.
        """
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


def plan_pass(hf: TextModel, hierarchy: Hierarchy | None, cache_dtype: torch.dtype) -> Planned:
    """The plan for the decoder of a model whose modules were made fast before.

    hierarchy: where its experts are. cache_dtype: of what attention keeps.
    """
    decoder = hf.get_decoder()
    layers: list[Any] = list(getattr(decoder, "layers", ()))
    specs = [layer_spec(layer) for layer in layers]
    found = _native_layers(layers, specs, _wiring(decoder) if any(specs) else Uncovered(), cache_dtype)
    natives = [each for each in found if isinstance(each, NativeLayer)]
    plan = None
    if natives:
        plan = PassPlan(natives[0].wiring, list(stages_of(layers, found, hierarchy)), natives)
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


def _wiring(decoder: Any) -> Wiring | Uncovered:
    try:
        return wiring_of(decoder)
    except Uncovered as reason:
        return reason


def _native_layers(
    layers: Iterable[Any], specs: Iterable[LayerSpec | None], wiring: Wiring | Uncovered, cache_dtype: torch.dtype
) -> list[Found]:
    """One layer of each kind is checked."""
    is_checked: dict[Hashable, Uncovered | None] = {}
    make = partial(NativeLayer, wiring=wiring, cache_dtype=cache_dtype)
    found = [_native_layer(layer, spec, make, is_checked) for layer, spec in zip(layers, specs, strict=True)]
    natives = [each for each in found if isinstance(each, NativeLayer)]
    rotaries = [native.rotary for native in natives if native.rotates]
    for native in natives:  # those that do not rotate are given what the others read
        native.rotary = rotaries[0] if rotaries else native.rotary
    return found


def _native_layer(
    layer: Any,
    spec: LayerSpec | None,
    make: Callable[[Any, LayerSpec], NativeLayer],
    is_checked: dict[Hashable, Uncovered | None],
) -> Found:
    if spec is None:
        return (f"a class that is not declared ({type(layer).__name__})",)
    try:
        native, kind = make(layer, spec), structure(layer)
        if kind not in is_checked:
            is_checked[kind] = _outcome(native)
        outcome = is_checked[kind]
        if outcome is not None:
            raise outcome
    except Uncovered as reason:
        return reason.reasons
    return native


def _outcome(native: NativeLayer) -> Uncovered | None:
    try:
        check_layer(native)
    except Uncovered as reason:
        return reason
    return None


def stages_of(layers: Sequence[Any], found: Sequence[Found], hierarchy: Hierarchy | None) -> Iterator[Stage]:
    """Native layers that follow each other and can be one span are one."""
    kinds = _span_kinds(found, hierarchy)
    for kind, row in groupby(enumerate(found), key=lambda item: kinds[item[0]]):
        for index, each in row:
            if not isinstance(each, NativeLayer):
                yield ModuleLayer(layers[index], index)
            elif kind is None or hierarchy is None:
                yield each
            else:
                rest = [native for _, native in row if isinstance(native, NativeLayer)]
                yield LayerSpan([each, *rest], hierarchy)


def _span_kinds(found: Sequence[Found], hierarchy: Hierarchy | None) -> list[Hashable]:
    """Equal for layers that may be in one span; None for those that may be in none. Dense ones join others."""
    if hierarchy is None:
        return [None for _ in found]
    kinds: list[Hashable] = [span_kind(hierarchy, each) if isinstance(each, NativeLayer) else None for each in found]
    for order in (range(len(found)), range(len(found))[::-1]):
        for at, beside in pairwise(order):
            each = found[beside]
            if isinstance(each, NativeLayer) and each.dense is not None:
                kinds[beside] = kinds[beside] or kinds[at]
    return kinds


def _why_no_span(native: NativeLayer) -> list[str]:
    if native.plain is not None:
        return ["experts that are not computed out of slots in RAM by the native kernels"]
    if not has_experts(native.layer):
        return list(DENSE)
    return ["a router or a shared expert in a form that no kernel takes"]
