"""generate() for models whose keys are rotated by the length of the sequence, see `offload_moe.decode.rotation`.

A prompt is rotated for its whole length also where it is computed in chunks. Where a sequence reaches a length that
rotates otherwise than the keys in its cache, in a prompt or in the middle of an answer, all of it is computed again.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import update_wrapper
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationConfig

from offload_moe.chat.prompt_chunks import prompt_chunk_tokens
from offload_moe.decode.rotation import RotationKeeper, length_of, rotation_keeper
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import CACHE, cache_in, take_cache, with_cache
from offload_moe.families.text_model import TextModel

logger = logging.getLogger(__name__)


class Recompute:
    """Wraps two methods of one model's generate(): `_prefill` and `prepare_inputs_for_generation`.

    `offload_moe.chat.steps` replaces the first one by `begin` and `whole_sequence_of`.
    """

    def __init__(self, hf: TextModel, keeper: RotationKeeper) -> None:
        self._hf, self._keeper = hf, keeper
        self._thread = threading.local()
        self._has_warned = False
        self._prefill: Callable[..., Any] = hf._prefill
        self._prepare: Callable[..., dict[str, Any]] = hf.prepare_inputs_for_generation
        hf._prefill = _Replacement(self, self._prefill, self.prefill)
        hf.prepare_inputs_for_generation = _Replacement(self, self._prepare, self.prepare)

    def take_crossed_window(self) -> int | None:
        """The window, in tokens, that a sequence of this thread crossed since the last call; None for none."""
        window: int | None = vars(self._thread).pop("crossed_window", None)
        return window

    def begin(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> int:
        """Empty a cache that does not fit a prompt. Returns the prompt's length, for which its parts are rotated.

        Raises: ConfigError when the emptied part of the sequence is not in `input_ids`.
        """
        cache = cache_in(model_kwargs)
        length = _sequence_length(input_ids, model_kwargs)
        if cache is not None and not self._keeper.fits(cache, length):
            given = model_kwargs.get("inputs_embeds")
            self._begin_anew(cache, given if given is not None else input_ids, length, model_kwargs)
        return length

    def whole_sequence_of(self, length: int) -> AbstractContextManager[None]:
        """See `RotationKeeper`."""
        return self._keeper.whole_sequence_of(length)

    def prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **rest: Any,
    ) -> Any:
        """Compute a prompt, or the part of it that the cache does not hold."""
        with self.whole_sequence_of(self.begin(input_ids, model_kwargs)):
            return self._prefill(input_ids, generation_config, model_kwargs, *args, **rest)

    def prepare(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """The inputs of the next step, with a cache whose keys are rotated as that step requires."""
        cache = take_cache(settings)
        if cache is not None and next_sequence_length is not None and not self._keeper.final_length:
            self._renew(cache, input_ids, next_sequence_length, settings)
        arguments = {"next_sequence_length": next_sequence_length, **settings}
        inputs = self._prepare(input_ids, **with_cache(cache), **arguments)
        if cache is not None and cache_in(inputs) is not cache:
            # Phi's own switch between its factors continues without the caller's cache.
            inputs = self._prepare(input_ids, **with_cache(None), **arguments)
            inputs[CACHE] = cache
        return inputs

    def _renew(self, cache: Cache, input_ids: Tensor, num_new: int, settings: dict[str, Any]) -> None:
        """Compute all tokens but the new ones again, where their keys are rotated otherwise."""
        length = _sequence_length(input_ids, settings)
        if self._keeper.fits(cache, length):
            return
        has_other_inputs = any(isinstance(value, Tensor) and value.is_floating_point() for value in settings.values())
        self._begin_anew(cache, input_ids[:, :0] if has_other_inputs else input_ids, length, settings)
        mask, positions = settings.get("attention_mask"), settings.get("position_ids")
        end = input_ids.shape[1] - num_new
        chunk = prompt_chunk_tokens(self._hf) or end
        with self._keeper.whole_sequence_of(length):
            for first in range(0, end, chunk):
                last = min(first + chunk, end)
                self._hf.get_decoder()(
                    input_ids=input_ids[:, first:last],
                    attention_mask=None if mask is None else mask[:, :last],
                    position_ids=None if positions is None else positions[..., first:last],
                    **with_cache(cache),
                    use_cache=True,
                )

    def _begin_anew(self, cache: Cache, given: Tensor, length: int, settings: dict[str, Any]) -> None:
        """Empty the cache. given: the available part of the sequence, ``[B, T, ...]``. Raises: ConfigError."""
        window = self._keeper.window_between(cache, length)
        assert window is not None
        if given.shape[1] < _num_places(given, settings):
            raise ConfigError(
                f"The sequence comes to {length:,} tokens. On the other side of {window:,} this model rotates all keys "
                "by other factors, so what is in the cache has to be computed again, and not all of it was given as "
                "input_ids. Pass the whole sequence as input_ids, or begin with an empty cache."
            )
        self._thread.crossed_window = window
        if window in self._keeper.rotation.growing and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Beyond %s tokens every new token changes the rotation of all keys of this model (dynamic NTK), so the "
                "whole sequence is computed again for each of them.",
                f"{window:,}",
            )
        cache.reset()


def recompute_of(hf: TextModel) -> Recompute | None:
    """Install a `Recompute` in a model that rotates by length, once; None for all other models."""
    replaced = vars(hf).get("_prefill")
    if isinstance(replaced, _Replacement):
        return replaced.owner
    keeper = rotation_keeper(hf)
    return None if keeper is None else Recompute(hf, keeper)


class _Replacement:
    """A method of `owner` in place of a model's, with its signature, which generate() inspects."""

    def __init__(self, owner: Recompute, method: Callable[..., Any], new: Callable[..., Any]) -> None:
        self.owner, self._new = owner, new
        update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._new(*args, **kwargs)


def _sequence_length(input_ids: Tensor, settings: dict[str, Any]) -> int:
    positions = settings.get("position_ids")
    return length_of(positions) if positions is not None else _num_places(input_ids, settings)


def _num_places(given: Tensor, settings: dict[str, Any]) -> int:
    """Length of the whole sequence, padding included."""
    known = [
        value.shape[-1] for name in ("position_ids", "attention_mask") if (value := settings.get(name)) is not None
    ]
    return max(known, default=given.shape[1])
