"""The guesses of one conversation: its source, the governor, and what came of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload_moe.residency.counters import Counters
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import Governor
from offload_moe.speculate.guess import MOST_GUESSES, NO_GUESS, Guess, Source
from offload_moe.speculate.tally import Tally


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a pass took."""

    num_rows: int = 0
    seconds: float = 0.0
    num_misses: int = 0  # of experts


@dataclass(slots=True)
class _Compared:
    """A guess, and how many of its tokens have come."""

    guess: Guess
    num_right: int = 0


class Speculator:
    """Used by one step loop at a time. `tally` counts from the last `begin` on."""

    def __init__(
        self,
        source: Source,
        costs: PassCosts,
        counters: Counters,
        governor: Governor | None = None,
        *,
        may_guess: Callable[[], bool] = lambda: True,
    ) -> None:
        """costs, counters: of the model. governor: None makes one. may_guess: whether a pass may have guesses now."""
        self.tally = Tally()
        self._may_guess = may_guess
        self._source, self._costs, self._counters = source, costs, counters
        self._governor = governor or Governor(costs, source.certainties, is_free=source.is_free)
        self._free_guess = NO_GUESS
        self._compared: list[_Compared] = []
        self._making_s = 0.0

    def begin(self, ids: Sequence[int]) -> None:
        """The prompt of an answer."""
        self.tally = Tally()
        self._compared = []
        self._source.begin(ids)

    def take(self, token: int) -> None:
        """The sequence has one more token."""
        self._compared = [each for each in self._compared if not self._is_decided(each, token)]
        self._source.take(token)
        if self._source.is_free:
            self._free_guess = self._source.guess(MOST_GUESSES)
            self._compare(self._free_guess)

    def guess(self, most: int) -> Sequence[int]:
        """The tokens to compute beside the next one, `most` or fewer."""
        self._making_s = 0.0
        if not self._may_guess():
            return ()
        if self._source.is_free:
            guess = self._free_guess
            return guess.tokens[: self._governor.choose(guess.kind, min(most, len(guess.tokens)))]
        number = self._governor.choose(0, most)
        if not number:
            return ()
        began = time.perf_counter()
        guess = self._source.guess(number)
        self._making_s = time.perf_counter() - began
        self._governor.note_making(len(guess.tokens), self._making_s)
        self._compare(guess)
        return guess.tokens

    def rate(self, most: int) -> float:
        """Expected tokens of the next pass per time of one without guesses, with `most` guesses or fewer."""
        if not self._may_guess():
            return 1.0
        guess = self._free_guess
        return self._governor.rate(guess.kind, min(most, len(guess.tokens)) if self._source.is_free else most)

    def note_plain(self, cost: PassCost) -> None:
        """A pass without guesses."""
        if cost.num_rows == 1:  # several are tokens that a grammar forced
            self._costs.note(1, cost.seconds, cost.num_misses)
            self._governor.note_plain(cost.seconds)

    def note_pass(self, cost: PassCost, num_guesses: int, num_right: int) -> None:
        """A pass with guesses, once it is known how many were right."""
        self._costs.note(cost.num_rows, cost.seconds, cost.num_misses)
        saved_s = self._governor.note_guesses(num_right, cost.seconds + self._making_s)
        more_misses = cost.num_misses - (1 + num_right) * self._costs.plain_misses
        self.tally.note(num_guesses, num_right, saved_s, more_misses)
        self._counters.num_guesses += num_guesses
        self._counters.num_right_guesses += num_right
        self._counters.saved_by_guesses_s += saved_s

    def _compare(self, guess: Guess) -> None:
        if guess.tokens:
            self._compared.append(_Compared(guess))

    def _is_decided(self, each: _Compared, token: int) -> bool:
        """Compare one more token."""
        tokens = each.guess.tokens
        each.num_right += (is_right := tokens[each.num_right] == token)
        if is_right and each.num_right < len(tokens):
            return False
        self._governor.score(each.guess.kind, each.num_right, len(tokens))
        return True
