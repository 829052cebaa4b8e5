"""Prompt lookup: what followed the last tokens where they stood before, in the prompt or in the answer.

Source: A. Saxena, "Prompt Lookup Decoding" (2023). The tracks that go on behind a difference, the replaced tokens and
the trust in each are our own.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from offload_moe.speculate.guess import NO_GUESS, Guess, num_alike
from offload_moe.speculate.places import Places
from offload_moe.speculate.replaced import Replaced
from offload_moe.speculate.track import Track, tracks_behind
from offload_moe.speculate.trust import Trust, Way

LONGEST = 16  # tokens that are compared
LENGTHS = (2, 3, 4, 6, 10)  # of matches, between which their ranks lie
ALIKE = (2, 3, 6)  # tokens of a track, likewise
LEAST_TRACK = 3  # tokens of a match that becomes a track once a token differs
CERTAINTIES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)  # of the first token of a guess, between which the kinds lie
LEAST_CERTAIN = 0.25  # of all tokens of a guess behind the first


class _Match(NamedTuple):
    """Tokens up to the end of a match, and its length; 0 for none."""

    place: int = 0
    length: int = 0


class _Found(NamedTuple):
    """A token that may come next, and how it was found."""

    way: Way
    token: int


class NgramSource:
    """At each token the likeliest is taken of what continues the longest match, the latest of equal ones, of what the
    tracks expect, and of what came in the place of these before.

    A kind is a range of certainty of the first token.
    """

    certainties = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95)  # low ones cost nothing: what they are is soon known
    is_free = True

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._pairs, self._singles = Places(2), Places(1)
        self._trust, self._replaced = Trust(), Replaced()
        self._num_prompt = 0
        self._tracks: list[Track] = []
        self._match = _Match()
        self._found: list[_Found] = []  # for the place of the next token

    def begin(self, ids: Sequence[int]) -> None:
        """What stays of the sequence before is not read again, and what was learned stays."""
        kept = num_alike(self._ids, [*ids])
        while len(self._ids) > kept:
            self._drop()
        for token in ids[kept:]:
            self._add(token)
        self._num_prompt, self._tracks = len(self._ids), []
        self._look()

    def take(self, token: int) -> None:
        self._learn(token)
        self._tracks = self._behind(self._tracks, self._match, token)
        self._add(token)
        self._look()

    def guess(self, most: int) -> Guess:
        """Tokens that are taken to have come, one after the other."""
        tracks, match, found, length = self._tracks, self._match, self._found, len(self._ids)
        kind, certainty = 0, 1.0
        while found and len(self._ids) < length + most:
            likeliest = max(found, key=self._certainty)
            if len(self._ids) == length:
                kind = bisect_right(CERTAINTIES, self._certainty(likeliest))
            else:
                certainty *= self._certainty(likeliest)
            if certainty < LEAST_CERTAIN:
                break
            tracks = self._behind(tracks, match, likeliest.token)
            self._ids.append(likeliest.token)
            match = self._match_behind(match)
            found = [*self._candidates(tracks, match)]
        tokens = tuple(self._ids[length:])
        del self._ids[length:]
        return Guess(tokens, kind) if tokens else NO_GUESS

    def _look(self) -> None:
        self._match = self._longest_match()
        self._found = [*self._candidates(self._tracks, self._match)]

    def _add(self, token: int) -> None:
        self._ids.append(token)
        self._pairs.add(self._ids)
        self._singles.add(self._ids)

    def _drop(self) -> None:
        self._pairs.drop(self._ids)
        self._singles.drop(self._ids)
        del self._ids[-1]

    def _learn(self, token: int) -> None:
        """What was found for the place of a token that has come."""
        behind = self._ids[-1] if self._ids else 0
        for way, expected in self._found:
            self._trust.note(way, is_right=expected == token)
            if way.name != "replaced":
                self._replaced.note(expected, token)
        right = {way.name: expected == token for way, expected in reversed(self._found)}  # the first of each name
        for name, is_right in right.items():
            self._trust.note_behind(name, behind, is_right=is_right)

    def _certainty(self, found: _Found) -> float:
        return self._trust.of(found.way, self._ids[-1])

    def _behind(self, tracks: Sequence[Track], match: _Match, token: int) -> list[Track]:
        """The tracks once a token has come."""
        place, length = match
        is_broken = length >= LEAST_TRACK and self._ids[place] != token
        return tracks_behind(tracks, token, self._ids, place if is_broken else None)

    def _candidates(self, tracks: Sequence[Track], match: _Match) -> Iterator[_Found]:
        """What may come next."""
        for way, token in self._expected(tracks, match):
            yield _Found(way, token)
            if (replaced := self._replaced[token]) is not None:
                yield _Found(Way("replaced", replaced[1]), replaced[0])

    def _expected(self, tracks: Sequence[Track], match: _Match) -> Iterator[tuple[Way, int]]:
        """What stands in earlier text."""
        if match.length:
            yield Way("match", bisect_right(LENGTHS, match.length)), self._ids[match.place]
        for place, num_right, _, _ in tracks:
            if num_right and match.place != place < len(self._ids):
                name = "prompt" if place < self._num_prompt else "track"
                yield Way(name, bisect_right(ALIKE, num_right)), self._ids[place]

    def _match_behind(self, match: _Match) -> _Match:
        """Once a token has come: a long match that goes on is not looked for anew."""
        if match.length >= LEAST_TRACK and self._ids[match.place] == self._ids[-1]:
            return _Match(match.place + 1, min(match.length + 1, LONGEST))
        return self._longest_match()

    def _longest_match(self) -> _Match:
        for size, places in ((2, self._pairs), (1, self._singles)):
            best = _Match()
            for place in places.of_end(self._ids):
                length = self._num_alike(place, size)
                if length > best.length:
                    best = _Match(place, length)
            if best.length:
                return best
        return _Match()

    def _num_alike(self, end: int, length: int) -> int:
        """How many tokens before `end` are the last ones of the sequence: so many, or more."""
        ids, last = self._ids, len(self._ids)
        while length < min(LONGEST, end) and ids[end - length - 1] == ids[last - length - 1]:
            length += 1
        return length
