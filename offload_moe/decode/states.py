"""The states of a layer of linear attention, from which tokens can be taken back.

They have a fixed size and move on in place. A pass whose last tokens may be taken back (`keep_next`) moves them through
a ring instead: each of its rows leaves them in a place of its own, and going back is the choice of another place.
"""

from collections.abc import Iterator
from itertools import islice, pairwise
from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from offload_moe.native.kernels import MAX_ROWS, state_places

NUM_PLACES = MAX_ROWS + 1  # the states before a pass, and behind each of its rows

State = tuple[dict[int, Any], int]  # where a layer has one


class StatesLayer(LinearAttentionLayer):
    """transformers' layer of states. Everything else (update, reorder, reset) is inherited.

    num_passed: tokens of passes by which they have moved on. rings: of each state, ``[places, ...]``; a place that was
    never used takes no memory on the CPU.
    """

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)
        self.num_passed = 0
        self._keeps_next = False
        self.rings: list[Tensor] = []
        self._shown: list[Tensor] = []  # what was last taken out of the rings, at this place
        self._place = 0
        self._trail: list[int] = []  # places of the states before the last pass that kept them, and behind each row

    @classmethod
    def of(cls, layer: LinearAttentionLayer) -> "StatesLayer":
        """The same states; the old layer must not be used any more."""
        states = cls(layer.number_of_states)
        for name, value in vars(layer).items():
            setattr(states, name, value)
        return states

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the present states alone."""
        kept = {name: dict(getattr(self, name)) for name in ("conv_states", "recurrent_states")}
        for states in kept.values():
            states.update({index: state.clone() for index, state in states.items() if state is not None})
        return vars(self) | kept | {"rings": [], "_shown": [], "_trail": [], "_keeps_next": False}

    @property
    def goes_back(self) -> bool:
        """Whether the next pass of one sequence can be taken back."""
        states = self._states()
        return bool(states) and not self.record_past and all(len(where[index]) == 1 for where, index in states)

    def keep_next(self) -> None:
        """The tokens of the next pass may be taken back."""
        self._keeps_next = True

    def keep_in(self, dtype: torch.dtype) -> None:
        """Keep the inputs of the convolution in this dtype; the state is in fp32 whatever modules compute in."""
        inputs = self.conv_states[0]
        if inputs is not None and inputs.dtype != dtype:
            self.conv_states[0] = inputs.to(dtype)

    def memory(self) -> tuple[Tensor, Tensor, int]:
        """Where the next pass finds the inputs of the convolution and the state: the rings, where it may be taken back.

        The tensors, and the place in them.
        """
        if self._keeps_next:
            self._find()
        if self._is_shown:
            inputs, state = self.rings
            return inputs, state, self._place
        inputs, state = self._present_states()
        return inputs, state, 0

    def gather(self) -> None:
        """Have the present states at the first place of new rings."""
        self._shown = []
        self._find()

    def next_places(self, num_tokens: int) -> list[int]:
        """The present place, and those of the states behind each of the next tokens, which are not counted."""
        if not self._keeps_next:
            return [self._place if self._is_shown else 0] * (num_tokens + 1)
        at = self._find()
        return [at, *islice((place for place in range(NUM_PLACES) if place != at), num_tokens)]

    def places(self, num_tokens: int) -> list[int]:
        """Count more tokens, whose states native calls write: the fields of `rooms_array` of each."""
        if not self._begin(num_tokens):
            inputs, state = self.conv_states[0], self.recurrent_states[0]
            assert inputs is not None
            assert state is not None
            return state_places(inputs, state, [(0, 0)] * num_tokens)
        inputs, state = self.rings
        self._show(self._trail[-1])
        return state_places(inputs, state, pairwise(self._trail))

    def rows(self, num_tokens: int) -> Iterator[None]:
        """Count more tokens, each of which a module moves the states on by before the next item."""
        if not self._begin(num_tokens):
            yield from [None] * num_tokens
            return
        for before, place in pairwise(self._trail):
            for ring in self.rings:
                ring[place].copy_(ring[before])
            self._show(place)
            yield

    def roll_back(self, num_tokens: int) -> None:
        """Take back the last tokens of the last pass, which kept what it went through."""
        assert num_tokens < len(self._trail)
        del self._trail[len(self._trail) - num_tokens :]
        self.num_passed -= num_tokens
        self._show(self._trail[-1])

    def _begin(self, num_tokens: int) -> bool:
        """Count them. Whether they go through the ring, in which they have places then."""
        self._trail = self.next_places(num_tokens) if self._keeps_next else []
        self.num_passed += num_tokens
        is_kept, self._keeps_next = self._keeps_next, False
        return is_kept

    @property
    def _is_shown(self) -> bool:
        """Whether the present states are those of the rings: other code may have replaced them."""
        present = self._present_states()
        return len(self._shown) == len(present) and all(map(is_, self._shown, present))

    def _find(self) -> int:
        """The place of the present states in the rings."""
        if not self._is_shown:
            present = self._present_states()
            with torch.inference_mode(False):  # so that they can be written to elsewhere
                self.rings = [state.new_empty((NUM_PLACES, *state.shape)) for state in present]
            for ring, state in zip(self.rings, present, strict=True):
                ring[0].copy_(state)
            self._show(0)
        return self._place

    def _show(self, place: int) -> None:
        self._place, self._shown = place, [ring[place] for ring in self.rings]
        for shown, (where, index) in zip(self._shown, self._states(), strict=True):
            where[index] = shown

    def _present_states(self) -> list[Tensor]:
        return [where[index] for where, index in self._states()]

    def _states(self) -> list[State]:
        found = [(where, index) for where in (self.conv_states, self.recurrent_states) for index in sorted(where)]
        return [(where, index) for where, index in found if where[index] is not None]
