"""Keys whose rotation depends on the length of the sequence: LongRoPE, dynamic NTK.

Nearly all models rotate a key by its position alone. These rotate all keys of a sequence by factors that its length
chooses, so keys in a cache serve only sequences of lengths with the same factors. The reference is one forward over the
whole sequence; `Rotation` is the one place that says which lengths agree with each other:

    longrope  one set of factors up to a window, another beyond it
    dynamic   one set up to a window, beyond it another one for every length

Source: transformers' `modeling_rope_utils.dynamic_rope_update`, whose cases these are.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from offload_moe.families.cache_name import cache_in
from offload_moe.families.text_model import TextModel

logger = logging.getLogger(__name__)

Factors = tuple[int, ...]  # equal for lengths that rotate alike
_ATTRIBUTE = "_offload_moe_rotation"  # of a model: its `RotationKeeper`; of a cache: the factors of its keys


@dataclass(frozen=True, slots=True)
class Rotation:
    """Windows of a model's rotary embeddings, in tokens.

    switching: beyond them a second set of factors counts. growing: beyond them each length has factors of its own.
    """

    switching: tuple[int, ...]
    growing: tuple[int, ...]

    def factors(self, length: int) -> Factors:
        switched = (min(max(length, window), window + 1) for window in self.switching)
        return (*switched, *(max(length, window) for window in self.growing))

    def crossed(self, before: Factors, after: Factors) -> int | None:
        """The first window on whose two sides, or beyond which, these lie; None where they are the same."""
        windows = (*self.switching, *self.growing)
        return next((w for w, old, new in zip(windows, before, after, strict=True) if old != new), None)


class RotationKeeper:
    """What a model that rotates by length needs beside its own code. Safe to use from several threads.

    rotation: its windows.
    """

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self._thread = threading.local()
        self._has_warned = False

    @property
    def final_length(self) -> int:
        """Tokens of the whole sequence that this thread computes in parts; 0 where it does no such thing."""
        return getattr(self._thread, "final_length", 0)

    @contextmanager
    def whole_sequence_of(self, length: int) -> Iterator[None]:
        """Forwards of parts of a sequence rotate as one forward over all its `length` tokens does."""
        before, self._thread.final_length = self.final_length, length
        try:
            yield
        finally:
            self._thread.final_length = before

    def fits(self, cache: Cache, length: int) -> bool:
        """Whether the keys in the cache are rotated as those of a sequence of this length."""
        return self.window_between(cache, length) is None

    def window_between(self, cache: Cache, length: int) -> int | None:
        """The window that lies between the keys in the cache and a sequence of this length; None where they agree."""
        num_cached = cache.get_seq_length()
        if not num_cached:
            return None
        kept = kept_factors(cache) or self.rotation.factors(num_cached)  # one that was filled before the model was ours
        return self.rotation.crossed(kept, self.rotation.factors(length))

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder: notes how the keys are rotated that this forward adds."""
        cache = cache_in(kwargs)
        if not isinstance(cache, Cache):
            return
        length = max(_length(cache, args, kwargs), self.final_length)
        window = self.window_between(cache, length)
        if window is not None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "This model rotates the keys of sequences beyond %s tokens by other factors, and a forward continues a "
                "cache across that length: its logits are those of no whole sequence. Compute the sequence anew, or "
                "let generate() do it.",
                f"{window:,}",
            )
        setattr(cache, _ATTRIBUTE, self.rotation.factors(length))


def _length(cache: Cache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of the sequence that a forward of the decoder continues."""
    if kwargs.get("position_ids") is not None:
        return length_of(kwargs["position_ids"])
    inputs = next(value for value in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if value is not None)
    return int(cache.get_seq_length() + inputs.shape[1])


class LengthRotary:
    """The forward of one rotary embedding: a function of the positions and of the sequence's length, nothing else."""

    def __init__(self, rotary: Any, keeper: RotationKeeper, *, is_growing: bool) -> None:
        self._forward: Callable[..., Any] = rotary.forward
        self._keeper = keeper
        self._is_growing = is_growing
        self._lock = threading.Lock()  # the module changes its own buffers

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """position_ids ``[..., T]`` -> cos and sin, or complex factors, ``[..., T, D]``."""
        with self._lock:
            if self._is_growing:  # else it keeps the factors of a longer sequence that it saw before
                self._forward(x, torch.zeros_like(position_ids[..., :1]), *args, **kwargs)
            last = self._keeper.final_length - 1
            if last <= 0 or last <= int(position_ids.max()):
                return self._forward(x, position_ids, *args, **kwargs)
            # The module takes the length from the last position.
            end = torch.full_like(position_ids[..., :1], last)
            rotated = self._forward(x, torch.cat((position_ids, end), -1), *args, **kwargs)
        return tuple(part[..., :-1, :] for part in rotated) if isinstance(rotated, tuple) else rotated[..., :-1, :]


def rotation_keeper(hf: TextModel) -> RotationKeeper | None:
    """The keeper of a model that rotates by length, put in place by the first call; None for all other models."""
    if _ATTRIBUTE not in vars(hf):
        setattr(hf, _ATTRIBUTE, _install(hf))
    keeper: RotationKeeper | None = vars(hf)[_ATTRIBUTE]
    return keeper


def kept_factors(cache: Cache | None) -> Factors | None:
    """How the keys in a cache are rotated; None where that does not depend on the length, or is not known."""
    factors: Factors | None = getattr(cache, _ATTRIBUTE, None)
    return factors


def length_of(position_ids: Tensor) -> int:
    """What rotary embeddings take for the sequence's length: of the longest sequence in a batch."""
    return int(position_ids.max()) + 1


def _install(hf: TextModel) -> RotationKeeper | None:
    decoder: Any = hf.get_decoder()
    windows = {module: _windows(module) for module in decoder.modules() if rotates_by_length(module)}
    if not windows:
        return None
    switching, growing = (tuple(sorted({w for found in windows.values() for w in found[kind]})) for kind in (0, 1))
    keeper = RotationKeeper(Rotation(switching, growing))
    for module, found in windows.items():
        module.forward = LengthRotary(module, keeper, is_growing=bool(found[1]))
    decoder.register_forward_pre_hook(keeper.before_forward, with_kwargs=True)
    return keeper


def rotates_by_length(rotary: Any) -> bool:
    """Whether a rotary embedding rotates by the length of the sequence, too."""
    return hasattr(rotary, "rope_type") and _windows(rotary) != ((), ())


def _windows(rotary: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Switching and growing windows of one rotary embedding, which may have one for each type of layer."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    switching, growing = [], []
    for layer_type, kind in kinds.items():
        parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
        parameters = parameters if layer_type is None else parameters.get(layer_type) or {}
        if "dynamic" in kind:
            growing.append(int(rotary.original_max_seq_len))
        has_scale = kind != "default" and "long_mscale" in parameters  # of phimoe, beyond the window
        switches = kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor")
        if switches or has_scale:
            switching.append(int(parameters["original_max_position_embeddings"]))
    return tuple(switching), tuple(growing)
