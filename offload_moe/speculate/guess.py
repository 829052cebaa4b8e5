"""What sources of guesses have in common."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from transformers import Cache

from offload_moe.native.kernels import MAX_ROWS

MOST_GUESSES = MAX_ROWS - 1  # beside the token that is computed in any case


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may come next. kind: guesses of one kind are right about equally often."""

    tokens: tuple[int, ...] = ()
    kind: int = 0


NO_GUESS = Guess()


class Source(Protocol):
    """Guesses the tokens that follow one sequence."""

    @property
    def certainties(self) -> Sequence[float]:
        """Of each kind, how often a token is expected to be right before any was compared."""

    @property
    def is_free(self) -> bool:
        """Whether guesses cost next to nothing, so that they are made and compared also where none is computed."""

    def begin(self, ids: Sequence[int]) -> None:
        """A sequence that has these tokens, in place of the one before."""

    def take(self, token: int) -> None:
        """The sequence has one more token."""

    def guess(self, most: int) -> Guess:
        """At most so many tokens; none where nothing can be said."""


@runtime_checkable
class StateSource(Source, Protocol):
    """A source that needs what the model's decoder gives for each token."""

    def attach(self, cache: Cache) -> None:
        """Go on from what was kept with this cache, before `begin`."""

    def passing(self, first: int, ids: Sequence[int]) -> AbstractContextManager[None]:
        """Around the pass of tokens that stand from token `first` of the sequence on. The last may be guesses."""

    @property
    def num_behind(self) -> int:
        """About how many tokens came meanwhile, where they are more than a guess takes along."""

    def catch_up(self) -> None:
        """Before `guess`: compute these. It depends on how long there were no guesses, and not on how many are made, so
        its time is no cost of a guess.
        """


def num_alike(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens in which two sequences begin alike."""
    if left == right[: len(left)]:
        return len(left)
    return next(at for at, (one, other) in enumerate(zip(left, [*right, -1], strict=False)) if one != other)
