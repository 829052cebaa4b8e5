"""Guesses of a draft model: a smaller language model of the same vocabulary, a token after the other.

V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from offload_moe.families.cache_name import with_cache
from offload_moe.families.text_model import TextModel
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.guess import Guess, num_alike
from offload_moe.system.stopping import leave_if_stopped

CHUNK = 512  # tokens of a prompt that the draft computes at once
_ATTRIBUTE = "_offload_moe_draft"  # of a cache


@dataclass(slots=True)
class Drafted:
    """What the draft has computed. It stays with the model's cache of a sequence, and is copied with that."""

    cache: DynamicCache
    ids: list[int] = field(default_factory=list)

    def crop(self, number: int) -> None:
        """Keep so many tokens; a pass that was stopped left more in some layers."""
        for layer in self.cache.layers:
            assert isinstance(layer, DynamicLayer)
            layer.crop(-max(0, layer.get_seq_length() - number))
        del self.ids[number:]


class DraftSource:
    """The likeliest tokens of the draft. Its cache goes on with the sequence, and drops what did not come.

    A prompt is computed along with the model's passes of it, chunk by chunk.
    """

    certainties = (0.7,)
    is_free = False

    def __init__(self, hf: TextModel, vocabulary: int) -> None:
        """hf: the draft, whose caches can be cropped. vocabulary: tokens that may be guessed."""
        self._hf, self._vocabulary = hf, vocabulary
        self._ids: list[int] = []
        self._drafted = self._new()

    def attach(self, cache: Cache) -> None:
        """See `StateSource`."""
        self._drafted = vars(cache).setdefault(_ATTRIBUTE, self._new())

    def begin(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)

    def take(self, token: int) -> None:
        self._ids.append(token)

    @contextmanager
    def passing(self, first: int, ids: Sequence[int]) -> Iterator[None]:
        """See `StateSource`."""
        yield
        end = first + len(ids)
        if len(ids) > 1 and end <= len(self._ids):
            self._compute(min(end, len(self._ids) - 1))

    @property
    def num_behind(self) -> int:
        """See `StateSource`."""
        number = len(self._ids) - len(self._drafted.ids)
        return number if number > MAX_ROWS else 0

    def catch_up(self) -> None:
        """See `StateSource`."""
        if len(self._ids) - self._keep() > MAX_ROWS:
            self._compute(len(self._ids) - 1)

    def guess(self, most: int) -> Guess:
        self.catch_up()
        tokens, guessed = self._ids[self._keep() :], list[int]()
        for _ in range(most):
            logits = self._pass(tokens)
            guessed.append(int(logits[: self._vocabulary].argmax()))
            tokens = guessed[-1:]
        return Guess(tuple(guessed))

    def _new(self) -> Drafted:
        return Drafted(DynamicCache(config=self._hf.config.get_text_config(decoder=True)))

    def _compute(self, end: int) -> None:
        """The cache holds the first so many tokens of the sequence from now on."""
        for first in range(self._keep(end), end, CHUNK):
            leave_if_stopped()
            self._pass(self._ids[first : min(first + CHUNK, end)])

    def _keep(self, end: int = -1) -> int:
        """Drop what did not come, and what is beyond a place, the last token if none is given. How much is left."""
        kept = num_alike(self._drafted.ids, self._ids[:end])
        self._drafted.crop(kept)
        return kept

    def _pass(self, tokens: Sequence[int]) -> Tensor:
        """The logits ``[V]`` behind these tokens."""
        ids = torch.tensor([tokens], device=self._hf.device)
        logits: Tensor = self._hf(ids, **with_cache(self._drafted.cache), use_cache=True, logits_to_keep=1).logits
        self._drafted.ids += tokens
        return logits[0, -1]
