"""The guesses of one conversation: its source, the governor, and what came of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from transformers import Cache

from offload_moe.residency.counters import Counters
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import Governor
from offload_moe.speculate.guess import MOST_GUESSES, NO_GUESS, Guess, Source, StateSource
from offload_moe.speculate.tally import Tally


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a pass took."""

    num_rows: int = 0
    seconds: float = 0.0
    num_misses: int = 0  # of experts


@dataclass(slots=True)
class _Way:
    """A source of guesses and its governor. guess: the present one of a source that is free."""

    source: Source
    governor: Governor
    guess: Guess = NO_GUESS


@dataclass(slots=True)
class _Compared:
    """A guess, and how many of its tokens have come."""

    guess: Guess
    governor: Governor
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
        beside: Sequence[Source] = (),
        may_guess: Callable[[], bool] = lambda: True,
    ) -> None:
        """costs, counters: of the model. governor: of `source`; None makes one.

        beside: further sources: the guesses of the one that promises most are computed. may_guess: whether a pass may
        have guesses now.
        """
        self.tally = Tally()
        self._may_guess = may_guess
        self._costs, self._counters = costs, counters
        self._ways = [_Way(each, Governor(costs, each.certainties, is_free=each.is_free)) for each in (source, *beside)]
        if governor is not None:
            self._ways[0].governor = governor
        self._used = self._ways[0]  # for the last guesses
        self._of_states = [each for each in (source, *beside) if isinstance(each, StateSource)]
        self._compared: list[_Compared] = []
        self._making_s = 0.0  # of the last guesses, with the time of catching up

    def begin(self, ids: Sequence[int], cache: Cache | None = None) -> None:
        """The prompt of an answer, before its first pass. cache: that the model computes it with."""
        self.tally = Tally()
        self._compared = []
        if cache is not None:
            for source in self._of_states:
                source.attach(cache)
        for way in self._ways:
            way.source.begin(ids)

    @contextmanager
    def passing(self, first: int, ids: Sequence[int]) -> Iterator[None]:
        """Around every pass of the sequence, see `StateSource`."""
        if not self._of_states:  # the usual case
            yield
            return
        with ExitStack() as stack:
            for source in self._of_states:
                stack.enter_context(source.passing(first, ids))
            yield

    def take(self, token: int) -> None:
        """The sequence has one more token."""
        self._compared = [each for each in self._compared if not self._is_decided(each, token)]
        for way in self._ways:
            way.source.take(token)
            if way.source.is_free:
                way.guess = way.source.guess(MOST_GUESSES)
                self._compare(way, way.guess)

    def guess(self, most: int, is_taken: Callable[[int], bool] = bool) -> Sequence[int]:
        """The tokens to compute beside the next one, `most` or fewer.

        is_taken: whether the pass takes so many, before the time to make them is spent.
        """
        self._making_s = 0.0
        if not self._may_guess():
            return ()
        chosen = self._chosen(most)
        if not chosen:
            return ()
        way, number = chosen[0] if len(chosen) == 1 else max(chosen, key=_rate)
        if not is_taken(number):
            return ()
        self._used = way
        if way.source.is_free:
            return way.guess.tokens[:number]
        guess = self._make(way, number)
        self._compare(way, guess)
        return guess.tokens

    def rate(self, most: int) -> float:
        """Expected tokens of the next pass per time of one without guesses, with `most` guesses or fewer."""
        if not self._may_guess():
            return 1.0
        return max(map(_rate, self._chosen(most)), default=1.0)

    def note_plain(self, cost: PassCost) -> None:
        """A pass without guesses."""
        if cost.num_rows == 1:  # several are tokens that a grammar forced
            spent = self._costs.note(1, cost.seconds, cost.num_misses)
            for way in self._ways:
                way.governor.note_plain(spent)

    def note_pass(self, cost: PassCost, num_guesses: int, num_right: int) -> None:
        """A pass with guesses, once it is known how many were right."""
        self._costs.note(cost.num_rows, cost.seconds, cost.num_misses)
        num_new = cost.num_rows - num_guesses  # more than one where a grammar forced tokens
        saved_s = self._used.governor.note_guesses(num_right, cost.seconds + self._making_s, num_new=num_new)
        more_misses = cost.num_misses - (num_new + num_right) * self._costs.plain_misses
        self.tally.note(num_guesses, num_right, saved_s, more_misses)
        self._counters.num_guesses += num_guesses
        self._counters.num_right_guesses += num_right
        self._counters.saved_by_guesses_s += saved_s

    def _chosen(self, most: int) -> list[tuple[_Way, int]]:
        """The sources whose guesses pay, and how many of them do."""
        return [(way, number) for way in self._ways if (number := self._choose(way, most))]

    @staticmethod
    def _choose(way: _Way, most: int) -> int:
        if way.source.is_free:
            return way.governor.choose(way.guess.kind, min(most, len(way.guess.tokens)))
        return way.governor.choose(0, most, way.source.num_behind if isinstance(way.source, StateSource) else 0)

    def _make(self, way: _Way, number: int) -> Guess:
        began = time.perf_counter()
        num_behind = 0
        if isinstance(way.source, StateSource):
            num_behind = way.source.num_behind
            way.source.catch_up()
        caught_up = time.perf_counter()
        guess = way.source.guess(number)
        ended = time.perf_counter()
        way.governor.note_catching_up(num_behind, caught_up - began)
        way.governor.note_making(len(guess.tokens), ended - caught_up)
        self._making_s = ended - began
        return guess

    def _compare(self, way: _Way, guess: Guess) -> None:
        if guess.tokens:
            self._compared.append(_Compared(guess, way.governor))

    def _is_decided(self, each: _Compared, token: int) -> bool:
        """Compare one more token."""
        tokens = each.guess.tokens
        each.num_right += (is_right := tokens[each.num_right] == token)
        if is_right and each.num_right < len(tokens):
            return False
        each.governor.score(each.guess.kind, each.num_right, len(tokens))
        return True


def _rate(chosen: tuple[_Way, int]) -> float:
    way, number = chosen
    return way.governor.rate(way.guess.kind, number)
