"""How often what was expected came, by the way it was found and by the token that it was expected behind."""

from typing import NamedTuple

FORGET = 0.1  # weight of the newest, of all that were found this way
KEEP = 0.8  # of what came behind a token, each time that it stands there again


class Way(NamedTuple):
    """How a token was found, and a rank of how well that is founded."""

    name: str
    rank: int


# Before any was compared.
EXPECTED = {
    Way("match", 0): 0.05,
    Way("match", 1): 0.15,
    Way("match", 2): 0.3,
    Way("match", 3): 0.5,
    Way("match", 4): 0.7,
    Way("match", 5): 0.9,
    Way("track", 0): 0.3,
    Way("track", 1): 0.6,
    Way("track", 2): 0.8,
    Way("track", 3): 0.9,
    Way("prompt", 0): 0.3,
    Way("prompt", 1): 0.6,
    Way("prompt", 2): 0.8,
    Way("prompt", 3): 0.9,
    Way("replaced", 1): 0.1,
    Way("replaced", 2): 0.4,
    Way("replaced", 3): 0.6,
    Way("replaced", 4): 0.8,
}


class Trust:
    """Of one conversation."""

    def __init__(self) -> None:
        self._of_way = dict(EXPECTED)
        self._behind: dict[tuple[str, int], tuple[float, float]] = {}  # times, and times right

    def of(self, way: Way, behind: int) -> float:
        """The probability of what was found this way behind a token."""
        times, right = self._behind.get((way.name, behind), (0.0, 0.0))
        return (right + self._of_way[way]) / (times + 1)

    def note(self, way: Way, *, is_right: bool) -> None:
        self._of_way[way] += FORGET * (is_right - self._of_way[way])

    def note_behind(self, name: str, behind: int, *, is_right: bool) -> None:
        times, right = self._behind.get((name, behind), (0.0, 0.0))
        self._behind[name, behind] = KEEP * times + 1, KEEP * right + is_right
