"""Tracks: earlier text that the end of a sequence repeats with differences, as one record of a list does another.

Behind a difference a track waits at the place where it began. From the next token on that stands behind this place, it
goes on from there.
"""

from collections.abc import Sequence
from typing import NamedTuple

REACH = 16  # tokens of a difference that are skipped, at most
PATIENCE = 24  # tokens that a track may differ in a row
MOST_TRACKS = 3


class Track(NamedTuple):
    """Where the token stands that is expected next.

    num_alike: tokens in a row that were as expected, 0 while it waits. num_astray: tokens since the last one of these.
    firm: the place before tokens were skipped, for a single token may be alike by chance.
    """

    place: int
    num_alike: int
    firm: int
    num_astray: int

    def behind(self, token: int, ids: Sequence[int]) -> "Track":
        """Once a token has come. ids: of the sequence before it."""
        place, num_alike, firm, num_astray = self
        if place < len(ids) and ids[place] == token:
            return Track(place + 1, num_alike + 1, place + 1 if num_alike else firm, 0)
        start = firm if num_alike == 1 else place
        for at in range(start, min(start + REACH + 1, len(ids))):
            if ids[at] == token:
                return Track(at + 1, 1, start, num_astray + 1)
        return Track(start, 0, start, num_astray + 1)


def tracks_behind(tracks: Sequence[Track], token: int, ids: Sequence[int], broken: int | None) -> list[Track]:
    """Those that go on once a token has come. broken: the place of a long match that it does not continue."""
    found = [each for track in tracks if (each := track.behind(token, ids)).num_astray <= PATIENCE]
    if broken is None or any(abs(each.firm - broken) <= REACH // 2 for each in found):
        return found
    if len(found) == MOST_TRACKS:
        found.remove(max(found, key=lambda track: track.num_astray))
    return [Track(broken, 0, broken, 0).behind(token, ids), *found]
