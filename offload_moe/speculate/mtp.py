"""Guesses of the checkpoint's own layer for multi-token prediction, see `checkpoint/mtp.py` for what it computes.

Entry i of its cache is made of token i + 1 and of what the model's decoder gave for token i, which every pass brings.
So it follows the model from the prompt on, as one more layer.

T tokens, H hidden, V vocabulary.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from offload_moe.decode import roll_back
from offload_moe.families.cache_name import with_cache
from offload_moe.families.text_model import MtpModel
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.guess import NO_GUESS, Guess, num_alike

CHUNK = 512  # tokens of a prompt that the layer computes at once
_ATTRIBUTE = "_offload_moe_mtp"  # of a cache


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

    def __init__(self, hf: MtpModel, vocabulary: int) -> None:
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
        output = hf.get_decoder()(inputs_embeds=x, **with_cache(cache), use_cache=True)
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    def likeliest(self, state: Tensor) -> int:
        """The token that a state ``[1, H]`` of its own stands for."""
        head = self.hf.get_output_embeddings()
        assert head is not None
        return int(head(state)[0, : self._vocabulary].argmax())


@dataclass(slots=True)
class Followed:
    """What the layer has of a sequence. It stays with the model's cache of it, and is copied with that.

    ids: of the sequence. entries: of the layer's cache: which tokens' states they are made of. waiting ``[T, H]``:
    states without entries yet, of the tokens `waiting_ids`, which stand from `first` on.
    """

    cache: DynamicCache
    ids: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    first: int = 0
    waiting: Tensor | None = None
    waiting_ids: list[int] = field(default_factory=list)

    def crop(self, number: int) -> None:
        """Keep so many entries."""
        if number < len(self.entries):
            roll_back(self.cache, len(self.entries) - number)
            del self.entries[number:]

    def forget(self, number: int) -> None:
        """Drop the first of the waiting states."""
        if number > 0 and self.waiting is not None:
            self.first += number
            self.waiting, self.waiting_ids = self.waiting[number:].clone(), self.waiting_ids[number:]


class MtpSource:
    """The likeliest tokens by the layer; each guess behind the first takes its own state in place of the model's."""

    certainties = (0.7,)
    is_free = False

    def __init__(self, module: MtpModule, states: FinalStates) -> None:
        """states: of the main model."""
        self._module, self._states = module, states
        self.followed = Followed(module.new_cache())

    def attach(self, cache: Cache) -> None:
        """See `StateSource`."""
        self.followed = vars(cache).setdefault(_ATTRIBUTE, Followed(self._module.new_cache()))

    def begin(self, ids: Sequence[int]) -> None:
        followed = self.followed
        kept = num_alike(followed.ids, ids)
        followed.crop(bisect_left(followed.entries, kept - 1))
        if kept <= followed.first:
            followed.waiting = None
        followed.ids = list(ids)

    def take(self, token: int) -> None:
        self.followed.ids.append(token)

    @contextmanager
    def passing(self, first: int, ids: Sequence[int]) -> Iterator[None]:
        """See `StateSource`."""
        with self._states.kept() as kept:
            yield
        if kept:
            self._wait(first, ids, kept[-1])

    @property
    def num_behind(self) -> int:
        """See `StateSource`. No more states wait than the first guess takes along."""
        return 0

    def catch_up(self) -> None:
        """See `StateSource`."""

    def guess(self, most: int) -> Guess:
        state = self._catch_up()
        if state is None:
            return NO_GUESS
        cache, tokens = self.followed.cache, [self._module.likeliest(state)]
        while len(tokens) < most:
            state = self._module(tokens[-1:], state, cache)
            tokens.append(self._module.likeliest(state))
        if len(tokens) > 1:
            roll_back(cache, len(tokens) - 1)
        return Guess(tuple(tokens))

    def _wait(self, first: int, ids: Sequence[int], states: Tensor) -> None:
        """States that a pass gave. Many of a prompt become entries at once; of others the last ones are kept."""
        followed, before = self.followed, self.followed.waiting
        is_prompt = len(ids) > 1 and first + len(ids) <= len(followed.ids)  # or a run that a grammar forced
        num_before = first - followed.first
        if before is not None and 0 < num_before <= len(before):
            states, ids = torch.cat((before[:num_before], states)), [*followed.waiting_ids[:num_before], *ids]
            first = followed.first
        followed.first, followed.waiting, followed.waiting_ids = first, states, list(ids)
        followed.crop(bisect_left(followed.entries, first))
        if is_prompt and len(states) > MAX_ROWS:
            self._catch_up()
        followed.forget(len(followed.waiting_ids) - MAX_ROWS)

    def _catch_up(self) -> Tensor | None:
        """Make entries of all tokens but the last. The layer's state ``[1, H]`` behind the sequence, if it is known."""
        followed, states, first = self.followed, self.followed.waiting, self.followed.first
        number = min(len(followed.waiting_ids), len(followed.ids) - 1 - first)
        if states is None or number < 1 or followed.waiting_ids[:number] != followed.ids[first : first + number]:
            return None
        made = states
        for begin in range(0, number, CHUNK):
            end = min(begin + CHUNK, number)
            following = followed.ids[first + begin + 1 : first + end + 1]
            made = self._module(following, states[begin:end], followed.cache)
        followed.entries += range(first, first + number)
        followed.forget(number)
        return made[-1:] if followed.entries[-1] == len(followed.ids) - 2 else None
