"""How often prompt lookup would have guessed the generated tokens of a trace, see `offload_moe.speculate.ngram`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from offload_moe.profile.trace import Trace
from offload_moe.speculate.guess import MOST_GUESSES
from offload_moe.speculate.ngram import CERTAINTIES, NgramSource


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessedKind:
    """Guesses whose first token was expected with a probability of `least` or more, up to the next kind.

    right: share of the first, second, ... that was right; behind the last of a guess none is.
    """

    least: float
    num_passes: int
    right: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """If as many as possible were computed in each pass.

    num_passes: that the generated tokens would have taken. kinds: those that occurred.
    """

    num_tokens: int
    num_passes: int
    kinds: list[GuessedKind]

    @property
    def tokens_per_pass(self) -> float:
        return self.num_tokens / self.num_passes


def guesses(trace: Trace) -> Guesses | None:
    """None where the trace has no generated tokens."""
    if trace.token_ids is None or trace.is_prompt is None or trace.is_prompt.all():
        return None
    ends = np.cumsum(trace.sequence_lengths)[:-1]
    sequences = zip(np.split(trace.token_ids, ends), np.split(trace.is_prompt, ends), strict=True)
    passes = [each for ids, is_prompt in sequences for each in _passes(ids.tolist(), is_prompt.tolist())]
    num_tokens = int((~trace.is_prompt).sum())
    return Guesses(num_tokens=num_tokens, num_passes=len(passes), kinds=[*_kinds(passes)])


def _passes(ids: Sequence[int], is_prompt: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Of each pass of a sequence: the kind of its guesses, -1 for none, and how many were right."""
    source = NgramSource()
    for is_given, run in groupby(range(len(ids)), is_prompt.__getitem__):
        places = [*run]
        if is_given:
            source.begin(ids[: places[-1] + 1])
        else:
            yield from _answer_passes(source, ids[places[0] : places[-1] + 1])


def _answer_passes(source: NgramSource, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    guess, num_right = None, 0
    for token in tokens:
        source.take(token)
        if guess is not None and guess.tokens[num_right : num_right + 1] == (token,):
            num_right += 1
            continue
        if guess is not None:
            yield guess.kind if guess.tokens else -1, num_right
        guess, num_right = source.guess(MOST_GUESSES), 0
    if guess is not None:
        yield guess.kind if guess.tokens else -1, num_right


def _kinds(passes: Sequence[tuple[int, int]]) -> Iterator[GuessedKind]:
    for kind, least in enumerate((0.0, *CERTAINTIES)):
        rights = [num_right for found, num_right in passes if found == kind]
        if rights:
            shares = [sum(num > at for num in rights) / len(rights) for at in range(MOST_GUESSES)]
            yield GuessedKind(least=least, num_passes=len(rights), right=shares)
