"""What a pass gave behind guessed tokens, for the step loop."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from offload_moe.chat.choice import Found
from offload_moe.decode import roll_back, takes_rows
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.speculator import PassCost, Speculator

# Passes the last tokens of the sequence, so many, and guessed ones behind them: what it gives behind the last token and
# behind each guess.
Compute = Callable[[int, Sequence[int]], Sequence[Found]]


class GuessedRows:
    """Follows the tokens of one sequence. The cache holds guesses only until a token comes that was not guessed."""

    def __init__(self, hf: PreTrainedModel, cache: Any, speculator: Speculator | None, compute: Compute) -> None:
        """cache: holds the sequence, with which the speculator has begun."""
        self._hf, self._cache, self._speculator, self._compute = hf, cache, speculator, compute
        self._num_new = 0  # tokens at the end of the sequence that the cache does not hold
        self._guesses: Sequence[int] = ()  # of the last pass
        self._num_right = 0  # of them, so far
        self._found: Sequence[Found] = ()  # behind each of them
        self._cost = PassCost()

    def follow(self, token: int) -> None:
        """The sequence has one more token."""
        if self._speculator is not None:
            self._speculator.take(token)
        if self._num_ahead and self._guesses[self._num_right] == token:
            self._num_right += 1
            return
        self._drop(self._num_ahead)
        self._num_new += 1

    def next(self, most: int) -> Found:
        """What is behind the sequence, which has more tokens than before.

        most: tokens that may come after the next one.
        """
        return self._pass(most) if self._num_new else self._found[self._num_right - 1]

    def take_back(self) -> None:
        """The cache holds the sequence without its last token from now on, or less where more were not computed."""
        if not self._num_new and self._num_right:
            self._drop(self._num_ahead + 1)
            self._num_new = 1
        self._drop(self._num_ahead)

    @property
    def _num_ahead(self) -> int:
        """Guesses in the cache whose tokens have not come."""
        return len(self._guesses) - self._num_right

    def _pass(self, most: int) -> Found:
        speculator, guesses = self._speculator, self._guess(min(most, MAX_ROWS - self._num_new))
        num_misses = 0 if speculator is None else speculator.count_misses()
        began = time.perf_counter()
        rows = self._compute(self._num_new, guesses)
        if speculator is not None:
            seconds, num_misses = time.perf_counter() - began, speculator.count_misses() - num_misses
            self._cost = PassCost(self._num_new + len(guesses), seconds, num_misses)
            if not guesses:
                speculator.note_plain(self._cost)
        first, *self._found = rows
        self._guesses, self._num_right, self._num_new = guesses, 0, 0
        return first

    def _guess(self, most: int) -> Sequence[int]:
        if self._speculator is None or most < 1:
            return ()
        guesses = self._speculator.guess(most)
        return guesses if guesses and takes_rows(self._hf, self._cache, self._num_new + len(guesses)) else ()

    def _drop(self, num_tokens: int) -> None:
        """Take the last tokens out of the cache; the guesses are done with."""
        if not self._guesses:
            return
        assert self._speculator is not None
        if num_tokens:
            roll_back(self._cache, num_tokens)
        self._speculator.note_pass(self._cost, len(self._guesses), self._num_right)
        self._guesses, self._num_right, self._found = (), 0, ()
