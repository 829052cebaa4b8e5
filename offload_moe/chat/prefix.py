"""Reuse of the key/value cache: the prefix that the next prompt shares with earlier turns is not computed again."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from offload_moe.chat.guessing import Guessing
from offload_moe.chat.template import common_prefix
from offload_moe.decode.cache import ROOMY, RoomyLayer, RoomySlidingLayer
from offload_moe.decode.rotation import Factors, kept_factors, rotation_keeper
from offload_moe.families.text_model import TextModel

CacheLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer
Reuse = Literal["nothing cached", "continued", "cropped", "snapshot", "recomputed", "not supported"]

# Exact types: a subclass may keep more than keys and values.
ATTENTION_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
# Families with recurrent or compressed state that continue it by several tokens at once with the numbers of a single
# pass. Others differ silently (Jamba in 5.23), so they compute every prompt from its beginning.
CONTINUED_FAMILIES = frozenset(
    {"deepseek_v4", "granitemoehybrid", "kimi_linear", "lfm2_moe", "nemotron_h", "qwen3_5_moe_text", "qwen3_next"}
)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """State after `length` tokens. Layers that can be cropped need no copy: cropping restores their state."""

    length: int
    layers: dict[int, CacheLayer]
    factors: Factors | None


class PrefixCache:
    """The cache of one conversation, the tokens that are in it, and the guesses of the conversation.

    Layers with full attention are cropped to the longest common prefix. Layers with sliding windows, recurrent or
    linear attention drop earlier state, so they continue only from a recorded one: the end of the last turn, or the
    snapshot taken before the last answer.
    """

    def __init__(self, hf: TextModel) -> None:
        self._hf = hf
        self._is_supported = continues_exactly(hf)
        self._keeper = rotation_keeper(hf)
        self.guessing = Guessing(hf)
        self.crossed_window: int | None = None
        self._is_open = False
        self.clear()

    def clear(self) -> None:
        self._is_parked = False
        self._cache: Cache | None = None
        self._ids: list[int] = []
        self._snapshot: _Snapshot | None = None

    @property
    def cache(self) -> Cache | None:
        """The cache to compute with; None makes the model create one for each answer."""
        return self._cache

    @property
    def num_tokens(self) -> int:
        """Tokens that take memory: those in the cache, and those of a snapshot that layers keep copies for."""
        snapshot = self._snapshot
        return len(self._ids) + (snapshot.length if snapshot is not None and snapshot.layers else 0)

    def num_usable(self, ids: Sequence[int]) -> int:
        """How many leading tokens of `ids` would be taken from here, without changing anything."""
        if self._cache is None or not self._ids or not self._is_supported:
            return 0
        if self._keeper is not None and self._keeper.window_between(self._cache, len(ids)) is not None:
            return 0
        shared = min(common_prefix(self._ids, ids), len(ids) - 1)
        if shared == len(self._ids) or all(_can_crop(layer) for layer in self._cache.layers):
            return shared
        return self._snapshot.length if self._snapshot is not None and self._snapshot.length <= shared else 0

    def num_lost(self, ids: Sequence[int]) -> int:
        """How many tokens in the cache `begin` with these ids would drop."""
        return len(self._ids) - self.num_usable(ids)

    def fork(self, ids: Sequence[int]) -> "PrefixCache":
        """Another cache of its own, which holds what this one has of `ids`."""
        twin = PrefixCache(self._hf)
        twin._cache, twin._ids = copy.deepcopy(self._cache), list(self._ids)
        twin._snapshot = self._snapshot  # `_restore` copies its layers
        twin._is_parked = self._is_parked
        twin.unpark()
        twin.begin(ids)
        twin._is_open = False
        return twin

    @property
    def is_parked(self) -> bool:
        """Whether the cache lies in RAM, away from the device that computes with it."""
        return self._is_parked

    @property
    def num_bytes(self) -> int:
        """Of the tensors in the cache, without a snapshot's."""
        return 0 if self._cache is None else sum(map(_num_bytes, self._cache.layers))

    def park(self) -> None:
        """Move the cache to RAM."""
        self._move("cpu")
        self._is_parked = self._cache is not None

    def unpark(self) -> None:
        """Move the cache back to the model's device."""
        if self._is_parked:
            self._move(self._hf.device)
            self._is_parked = False

    def _move(self, device: torch.device | str) -> None:
        """Replace the cache by another object, so that what is accounted by cache counts the old one no more."""
        if self._cache is not None:
            cache = copy.copy(self._cache)
            cache.layers = [_moved(layer, device) for layer in cache.layers]
            self._cache = cache
        if self._snapshot is not None:
            layers = {index: _moved(layer, device) for index, layer in self._snapshot.layers.items()}
            self._snapshot = replace(self._snapshot, layers=layers)

    @property
    def needs_snapshot(self) -> bool:
        """Whether a layer drops earlier state, so that a snapshot is needed before the answer."""
        return self._cache is not None and not all(_is_plain(layer) for layer in self._cache.layers)

    def begin(self, ids: Sequence[int]) -> tuple[int, Reuse]:
        """Reduce the cache to a prefix of `ids`, shorter than `ids`. Returns its length in tokens and how it is reused.

        Sets `crossed_window`: the length beyond which the model rotates otherwise, if that is why nothing is reused.
        """
        self.crossed_window = None
        if not self._is_supported:
            return 0, "not supported"
        if self._is_open:
            # The last answer is not committed, and may still be computed.
            self._start_over()
        self._is_open = True
        shared = min(common_prefix(self._ids, ids), len(ids) - 1)
        if self._cache is None or not self._ids:
            self._start_over()
            return 0, "nothing cached"
        if self._keeper is not None:
            self.crossed_window = self._keeper.window_between(self._cache, len(ids))
            if self.crossed_window is not None:
                self._start_over()
                return 0, "recomputed"
        if shared == len(self._ids):
            return shared, "continued"
        if all(_can_crop(layer) for layer in self._cache.layers):
            self._crop(shared)
            return shared, "cropped" if shared else "recomputed"
        if self._snapshot is not None and self._snapshot.length <= shared:
            self._restore(self._snapshot)
            return self._snapshot.length, "snapshot"
        self._start_over()
        return 0, "recomputed"

    def commit(self, cache: Cache | None, ids: Sequence[int], *, is_whole: bool) -> None:
        """Record which tokens are in the cache now; does nothing for a cache that was replaced.

        `is_whole` is False when a forward pass was left in the middle: some layers then hold more than `ids`.
        """
        if cache is not self._cache or cache is None:
            return
        self._is_open = False
        if self._snapshot is not None and self._snapshot.factors != kept_factors(cache):
            self._snapshot = None
        if is_whole:
            self._ids = list(ids)
            return
        if self._keeper is not None:
            ids = ids[: self._num_held()]
        if all(_can_crop(layer) for layer in cache.layers):
            self._ids = list(ids)
            self._crop(len(ids))
        elif self._snapshot is not None and self._snapshot.length <= len(ids):
            self._ids = list(ids)
            self._restore(self._snapshot)
        else:
            self.clear()

    def take_snapshot(self) -> None:
        """Keep the present state for later turns."""
        assert self._cache is not None
        layers = {index: copy.deepcopy(layer) for index, layer in enumerate(self._cache.layers) if not _is_plain(layer)}
        self._snapshot = _Snapshot(len(self._ids), layers, kept_factors(self._cache))

    def is_kept_at(self, length: int, total: int) -> bool:
        """Whether the keys after `length` tokens are rotated as in a sequence of `total` tokens."""
        keeper = self._keeper
        return keeper is None or keeper.rotation.factors(length) == keeper.rotation.factors(total)

    def _num_held(self) -> int:
        """Tokens that all layers hold; fewer than before when a recomputation was interrupted."""
        assert self._cache is not None
        held = [layer.get_seq_length() for layer in self._cache.layers if isinstance(layer, DynamicLayer)]
        return min(held, default=0)

    def _start_over(self) -> None:
        self.clear()
        self._cache = _new_cache(self._hf)

    def _crop(self, length: int) -> None:
        assert self._cache is not None
        for layer in self._cache.layers:
            _crop_layer(layer, length)
        self._ids = self._ids[:length]
        if self._snapshot is not None and self._snapshot.length > length:
            self._snapshot = None

    def _restore(self, snapshot: _Snapshot) -> None:
        assert self._cache is not None
        for index, layer in enumerate(self._cache.layers):
            if index in snapshot.layers:
                self._cache.layers[index] = copy.deepcopy(snapshot.layers[index])
            else:
                _crop_layer(layer, snapshot.length)
        self._ids = self._ids[: snapshot.length]


def continues_exactly(hf: TextModel) -> bool:
    """Whether several passes over one cache give the numbers of a single pass."""
    # "hybrid" is an old default of some checkpoints that generate() itself ignores.
    if (
        hf.config.is_encoder_decoder
        or "mamba" in type(hf).__name__.lower()
        or not hf._supports_default_dynamic_cache()
        or hf.generation_config.cache_implementation not in (None, "hybrid")
    ):
        return False
    layers = _new_cache(hf).layers
    family = hf.config.get_text_config(decoder=True).model_type
    return family in CONTINUED_FAMILIES or all(type(layer) in ATTENTION_LAYERS for layer in layers)


def _moved(layer: CacheLayer, device: torch.device | str) -> CacheLayer:
    """A copy on another device, without room to grow."""
    twin = copy.copy(layer)
    if isinstance(twin, ROOMY):
        twin.give_room_up()
    for name, value in list(vars(twin).items()):
        setattr(twin, name, _moved_value(value, device))
    return twin


def _moved_value(value: Any, device: torch.device | str) -> Any:
    match value:
        case torch.Tensor():
            return value.to(device, copy=True)
        case list() | tuple():
            return type(value)(_moved_value(each, device) for each in value)
        case dict():
            return {name: _moved_value(each, device) for name, each in value.items()}
    return value


def _new_cache(hf: TextModel) -> DynamicCache:
    return DynamicCache(config=hf.config.get_text_config(decoder=True))


def _is_plain(layer: CacheLayer) -> bool:
    return type(layer) in (DynamicLayer, RoomyLayer, DummyLayer)


def _can_crop(layer: CacheLayer) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer) and type(layer) in (DynamicSlidingWindowLayer, RoomySlidingLayer):
        return bool(layer.get_seq_length() < layer.sliding_window)
    return _is_plain(layer)


def _crop_layer(layer: CacheLayer, length: int) -> None:
    if isinstance(layer, DynamicLayer) and (excess := layer.get_seq_length() - length) > 0:
        # A negative number removes that many tokens; a positive one meant something else in older versions.
        layer.crop(-excess)


def _num_bytes(layer: Any) -> int:
    """Keys and values, which may be properties, and states, which lie in dictionaries."""
    values = [getattr(layer, name, None) for name in {"keys", "values"} | vars(layer).keys()]
    tensors = [each for value in values for each in (value.values() if isinstance(value, dict) else (value,))]
    return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
