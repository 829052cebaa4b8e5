"""Guesses of a draft model: a smaller language model of the same vocabulary, a token after the other.

V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from offload_moe.speculate.guess import Guess, num_alike

CHUNK = 512  # tokens of a prompt that the draft computes at once


class DraftSource:
    """The likeliest tokens of the draft. Its cache goes on with the sequence, and drops what did not come."""

    certainties = (0.7,)
    is_free = False

    def __init__(self, hf: Any, vocabulary: int) -> None:
        """hf: the draft, whose caches can be cropped. vocabulary: tokens that may be guessed."""
        self._hf, self._vocabulary = hf, vocabulary
        self._cache = DynamicCache(config=hf.config.get_text_config(decoder=True))
        self._ids: list[int] = []
        self._cached: list[int] = []

    def begin(self, ids: Sequence[int]) -> None:
        """Computes what is new of the prompt, but for its last token."""
        self._ids = list(ids)
        self._catch_up()

    def take(self, token: int) -> None:
        self._ids.append(token)

    def guess(self, most: int) -> Guess:
        self._catch_up()
        tokens = self._ids[-1:]
        for _ in range(most):
            logits = self._pass(tokens[-1:])
            tokens.append(int(logits[: self._vocabulary].argmax()))
        return Guess(tuple(tokens[1:]))

    def _catch_up(self) -> None:
        """The cache holds the sequence without its last token."""
        end = len(self._ids) - 1
        kept = num_alike(self._cached, self._ids[:end])
        if kept < len(self._cached):
            self._cache.crop(kept - len(self._cached))
            del self._cached[kept:]
        for first in range(kept, end, CHUNK):
            self._pass(self._ids[first : min(first + CHUNK, end)])

    def _pass(self, tokens: Sequence[int]) -> Tensor:
        """The logits ``[V]`` behind these tokens."""
        ids = torch.tensor([tokens], device=self._hf.device)
        logits: Tensor = self._hf(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._cached += tokens
        return logits[0, -1]
