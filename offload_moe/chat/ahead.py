"""What a pass gave behind guessed tokens, or together with other answers, for the step loop.

V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from offload_moe.chat.choice import Found
from offload_moe.chat.sharing import Member, Row, sharing_of
from offload_moe.decode import keep_next, roll_back, takes_rows
from offload_moe.families.text_model import TextModel
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.speculation import speculation_of
from offload_moe.speculate.speculator import PassCost, Speculator

# Passes the last tokens of the sequence, so many, and guessed ones behind them: what it gives behind the last token and
# behind each guess.
Compute = Callable[[int, Sequence[int]], Sequence[Found]]


class GuessedRows:
    """Follows the tokens of one sequence.

    The cache holds guesses only until a token comes that was not guessed, and the last token where another answer's
    pass has computed it.
    """

    def __init__(
        self,
        hf: TextModel,
        cache: Any,
        compute: Compute,
        *,
        speculator: Speculator | None = None,
        member: Member | None = None,
    ) -> None:
        """cache: holds the sequence, with which the speculator has begun.

        member: its place among answers that share passes.
        """
        self._hf, self._cache, self._speculator, self._compute = hf, cache, speculator, compute
        self._member, self._sharing = member, sharing_of(hf)
        self._counters = speculation_of(hf).counters
        self._last = 0  # token
        self._num_new = 0  # tokens at the end of the sequence that the cache does not hold
        self._guesses: Sequence[int] = ()  # of the last pass
        self._num_right = 0  # of them, so far
        self._found: Sequence[Found] = ()  # behind each of them
        self._cost = PassCost()

    def follow(self, token: int) -> None:
        """The sequence has one more token."""
        self._withdraw()
        self._last = token
        if self._speculator is not None:
            self._speculator.take(token)
        if self._num_ahead and self._guesses[self._num_right] == token:
            self._num_right += 1
            return
        self._drop(self._num_ahead)
        self._num_new += 1

    def offer(self, most: int) -> None:
        """Until the next call, passes of other answers may compute the last token. most: as for `next`."""
        if self._member is not None and self._num_new == 1:
            self._sharing.offer(self._member, self._row(most))

    def next(self, most: int) -> Found:
        """What is behind the sequence, which has more tokens than before.

        most: tokens that may come after the next one.
        """
        logits = self._withdraw()
        if logits is not None:
            return logits
        return self._pass(most) if self._num_new else self._found[self._num_right - 1]

    def take_back(self) -> None:
        """The cache holds the sequence without its last token from now on, or less where more were not computed."""
        if self._withdraw() is not None:
            roll_back(self._cache, 1)
            self._num_new = 1
        if not self._num_new and self._num_right:
            self._drop(self._num_ahead + 1)
            self._num_new = 1
        self._drop(self._num_ahead)

    @property
    def _num_ahead(self) -> int:
        """Guesses in the cache whose tokens have not come."""
        return len(self._guesses) - self._num_right

    def _withdraw(self) -> Tensor | None:
        """The logits ``[1, V]`` behind the last token, where another answer's pass has computed it."""
        logits = None if self._member is None else self._sharing.withdraw(self._member)
        if logits is not None:
            self._num_new = 0
        return logits

    def _pass(self, most: int) -> Found:
        if self._member is not None and self._num_new == 1:
            logits = self._sharing.compute(self._hf, self._member, self._row(most))
            if logits is not None:
                self._num_new = 0
                return logits
        guesses = self._guess(min(most, MAX_ROWS - self._num_new))
        num_misses, began = self._counters.num_absent, time.perf_counter()
        if guesses:
            keep_next(self._cache)
        rows = self._compute(self._num_new, guesses)
        seconds, num_misses = time.perf_counter() - began, self._counters.num_absent - num_misses
        self._note(PassCost(self._num_new + len(guesses), seconds, num_misses), is_plain=not guesses)
        first, *self._found = rows
        self._guesses, self._num_right, self._num_new = guesses, 0, 0
        return first

    def _row(self, most: int) -> Row:
        speculator, most = self._speculator, min(most, MAX_ROWS - 1)
        return Row(self._last, self._cache, lambda: 1.0 if speculator is None else speculator.rate(most))

    def _note(self, cost: PassCost, *, is_plain: bool) -> None:
        """A pass of this answer alone."""
        self._cost = cost
        self._counters.num_passes += 1
        self._counters.num_rows += cost.num_rows
        if self._speculator is not None and is_plain:
            self._speculator.note_plain(cost)
        if self._member is not None:
            self._sharing.note_alone(self._member, cost, is_plain=is_plain)

    def _guess(self, most: int) -> Sequence[int]:
        if self._speculator is None or most < 1 or (self._member is not None and self._sharing.is_measuring):
            return ()
        return self._speculator.guess(most, lambda number: takes_rows(self._hf, self._cache, self._num_new + number))

    def _drop(self, num_tokens: int) -> None:
        """Take the last tokens out of the cache; the guesses are done with."""
        if not self._guesses:
            return
        assert self._speculator is not None
        if num_tokens:
            roll_back(self._cache, num_tokens)
        self._speculator.note_pass(self._cost, len(self._guesses), self._num_right)
        self._guesses, self._num_right, self._found = (), 0, ()
