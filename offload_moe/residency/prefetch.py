"""Decides by measurement whether prefetching pays. Pure Python, no torch.

Tokens are timed in short blocks, alternately with and without prefetch; the quicker way is kept for many tokens, then
measured again. Trials are few, so that even a predictor that is always wrong costs little.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 6
NUM_BLOCKS = 8  # of a trial, on and off in turn
SETTLED_TOKENS = 512  # between trials
LEAST_LOSS = 0.01  # prefetch must cost this share of a token's time to be turned off
MEMORY_GUESSES = 4096  # of a tally
RANK_MEMORY = 256
LEAST_GUESSES = 16  # before a rank is judged
LEAST_PRECISION = 0.5  # below it a fetch delays others on the disk or the link more often than it helps


@dataclass(slots=True)
class LayerTally:
    """The quality of the guesses for one layer; counts of experts, mostly of recent tokens.

    num_fetched, num_useful: of all guesses, those that were fetched, and those of them that were then routed to; times
    the bytes of a record, the bytes that the lookahead moved, and the useful ones among them.
    """

    num_guessed: int = 0
    num_right: int = 0
    num_routed: int = 0
    num_fetched: int = 0
    num_useful: int = 0

    def note(self, guessed: Sequence[int], routed: Sequence[int]) -> None:
        """Count one token. guessed, routed: the predicted experts, and those that the router then chose."""
        if self.num_guessed >= MEMORY_GUESSES:  # the recent ones count more
            self.num_guessed //= 2
            self.num_right //= 2
            self.num_routed //= 2
        self.num_guessed += len(guessed)
        self.num_right += len(set(guessed) & set(routed))
        self.num_routed += len(routed)

    def note_fetched(self, fetched: Sequence[int], routed: Sequence[int]) -> None:
        """Count one token. fetched, routed: guesses that were fetched, and the experts that the router then chose."""
        self.num_fetched += len(fetched)
        self.num_useful += len(set(fetched) & set(routed))

    @property
    def recall(self) -> float:
        """Share of the routed experts that had been guessed, 0 to 1."""
        return self.num_right / self.num_routed if self.num_routed else 0.0

    @property
    def precision(self) -> float:
        """Share of the guesses that were right, 0 to 1."""
        return self.num_right / self.num_guessed if self.num_guessed else 0.0


@dataclass(slots=True)
class RankTally:
    """How often the n-th likeliest guess, where it was absent, was right; mostly of recent guesses."""

    num_guessed: int = 0
    num_right: int = 0

    def note(self, *, is_right: bool) -> None:
        """Count one guess that was absent."""
        if self.num_guessed >= RANK_MEMORY:
            self.num_guessed //= 2
            self.num_right //= 2
        self.num_guessed += 1
        self.num_right += is_right

    @property
    def is_worth_fetching(self) -> bool:
        """Whether at least `LEAST_PRECISION` of these guesses were right, or too few were counted."""
        return self.num_guessed < LEAST_GUESSES or self.num_right >= LEAST_PRECISION * self.num_guessed


class PrefetchGovernor:
    """Turns prefetch on and off. `begin_token` is called at the first layer of every decoded token."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.is_on = True
        self.num_tokens = 0
        self._clock = clock
        self._began: float | None = None
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._trial_left = BLOCK_TOKENS * NUM_BLOCKS
        self._settled_left = 0

    def begin_token(self) -> bool:
        """Whether to prefetch during this token."""
        now = self._clock()
        if self._began is not None and self._trial_left:
            self._note(now - self._began)
        self._began = now
        self.num_tokens += 1
        if not self._trial_left:
            self._settled_left -= 1
            if self._settled_left <= 0:
                self._trial_left = BLOCK_TOKENS * NUM_BLOCKS
                self._began = None
        if self._trial_left:
            self.is_on = (self._trial_left - 1) // BLOCK_TOKENS % 2 == 1
        return self.is_on

    def pause(self) -> None:
        """Leave the time until the next token out: a prompt, or a wait for the user, comes between."""
        self._began = None

    def _note(self, seconds: float) -> None:
        self._times[self.is_on].append(seconds)
        self._trial_left -= 1
        if not self._trial_left:
            on, off = statistics.median(self._times[True]), statistics.median(self._times[False])
            self.is_on = on < off * (1 + LEAST_LOSS)
            self._times = {True: [], False: []}
            self._settled_left = SETTLED_TOKENS
