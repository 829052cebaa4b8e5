"""Guesses of the checkpoint's own layer for multi-token prediction, see `checkpoint/mtp.py` for what it computes.

Entry i of its cache is made of token i + 1 and of what the model's decoder gave for token i, which every pass brings.
So it follows the model from the prompt on, as one more layer.

T tokens, H hidden, V vocabulary.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from offload_moe.decode import roll_back
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.guess import NO_GUESS, Guess, num_alike

CHUNK = 512  # tokens of a prompt that the layer computes at once


class FinalStates:
    """What a decoder gives for each token, behind its last norm, while a thread keeps it."""

    def __init__(self, decoder: Any) -> None:
        self._of_thread = threading.local()
        decoder.register_forward_hook(self._note)

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """The states ``[T, H]`` of each forward of this thread meanwhile."""
        kept: list[Tensor] = []
        self._of_thread.kept = kept
        try:
            yield kept
        finally:
            self._of_thread.kept = None

    def _note(self, module: Any, args: Any, output: Any) -> None:
        kept = getattr(self._of_thread, "kept", None)
        if kept is not None:
            kept.append(output.last_hidden_state[0])


class MtpModule:
    """The layer, with what stands before and behind it. vocabulary: tokens that may be guessed."""

    def __init__(self, hf: Any, vocabulary: int) -> None:
        """hf: of `build_mtp`, with the main model's embedding and head."""
        self.hf = hf
        self._vocabulary = vocabulary

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.hf.config)

    def __call__(self, ids: Sequence[int], states: Tensor, cache: DynamicCache) -> Tensor:
        """Of some tokens one after the other, and of the states ``[T, H]`` of those before each: its own ``[T, H]``."""
        hf = self.hf
        embedded = hf.get_input_embeddings()(torch.tensor([ids], device=states.device))
        x = hf.eh_proj(torch.cat((hf.enorm(embedded), hf.hnorm(states[None])), -1))
        output = hf.get_decoder()(inputs_embeds=x, past_key_values=cache, use_cache=True)
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    def likeliest(self, state: Tensor) -> int:
        """The token that a state ``[1, H]`` of its own stands for."""
        return int(self.hf.get_output_embeddings()(state)[0, : self._vocabulary].argmax())


class MtpSource:
    """The likeliest tokens by the layer; each guess behind the first takes its own state in place of the model's."""

    certainties = (0.7,)
    is_free = False

    def __init__(self, module: MtpModule, states: FinalStates) -> None:
        """states: of the main model."""
        self._module, self._states = module, states
        self.cache = module.new_cache()
        self._ids: list[int] = []
        self._entries: list[int] = []  # of the cache: which tokens' states they are made of
        self._first = 0  # the token that the first of these states is of
        self._waiting: Tensor | None = None  # states ``[T, H]`` of which no entry is made yet
        self._waiting_ids: list[int] = []

    def begin(self, ids: Sequence[int]) -> None:
        kept = num_alike(self._ids, ids)
        self._crop(bisect_left(self._entries, kept - 1))
        if kept <= self._first:
            self._waiting = None
        self._ids = list(ids)

    def take(self, token: int) -> None:
        self._ids.append(token)

    @contextmanager
    def passing(self, first: int, ids: Sequence[int]) -> Iterator[None]:
        """See `StateSource`."""
        with self._states.kept() as kept:
            yield
        if kept:
            self._wait(first, ids, kept[-1])

    def guess(self, most: int) -> Guess:
        state = self._catch_up()
        if state is None:
            return NO_GUESS
        tokens = [self._module.likeliest(state)]
        while len(tokens) < most:
            state = self._module(tokens[-1:], state, self.cache)
            tokens.append(self._module.likeliest(state))
        if len(tokens) > 1:
            roll_back(self.cache, len(tokens) - 1)
        return Guess(tuple(tokens))

    def _wait(self, first: int, ids: Sequence[int], states: Tensor) -> None:
        """States that a pass gave. Those of a prompt become entries at once; of others the last ones are kept."""
        before = self._waiting
        num_before = first - self._first
        if before is not None and 0 < num_before <= len(before):
            states, ids = torch.cat((before[:num_before], states)), [*self._waiting_ids[:num_before], *ids]
            first = self._first
        self._first, self._waiting, self._waiting_ids = first, states, list(ids)
        self._crop(bisect_left(self._entries, first))
        if len(states) > 2 * MAX_ROWS:
            self._catch_up()
        self._forget(len(self._waiting_ids) - MAX_ROWS)

    def _catch_up(self) -> Tensor | None:
        """Make entries of all tokens but the last. The layer's state ``[1, H]`` behind the sequence, if it is known."""
        states, first = self._waiting, self._first
        number = min(len(self._waiting_ids), len(self._ids) - 1 - first)
        if states is None or number < 1 or self._waiting_ids[:number] != self._ids[first : first + number]:
            return None
        made = None
        for begin in range(0, number, CHUNK):
            end = min(begin + CHUNK, number)
            following = self._ids[first + begin + 1 : first + end + 1]
            made = self._module(following, states[begin:end], self.cache)
        self._entries += range(first, first + number)
        self._forget(number)
        assert made is not None
        return made[-1:] if self._entries[-1] == len(self._ids) - 2 else None

    def _forget(self, number: int) -> None:
        """Drop the first of the waiting states."""
        if number > 0 and self._waiting is not None:
            self._first += number
            self._waiting, self._waiting_ids = self._waiting[number:].clone(), self._waiting_ids[number:]

    def _crop(self, number: int) -> None:
        """Keep so many entries."""
        if number < len(self._entries):
            roll_back(self.cache, len(self._entries) - number)
            del self._entries[number:]
