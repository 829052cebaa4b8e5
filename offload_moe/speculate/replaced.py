"""Tokens that stand for others in what is written again: a name that is changed, a comma that becomes a quote."""

MOST_TIMES = 4


class Replaced:
    """Of one conversation."""

    def __init__(self) -> None:
        self._by: dict[int, tuple[int, int]] = {}  # the token in its place, and how often in a row

    def __getitem__(self, token: int) -> tuple[int, int] | None:
        return self._by.get(token)

    def note(self, expected: int, came: int) -> None:
        """A token came where earlier text has another, or the same."""
        found = self._by.get(expected)
        if expected != came:
            times = found[1] + 1 if found is not None and found[0] == came else 1
            self._by[expected] = came, min(times, MOST_TIMES)
        elif found is not None and found[1] > 1:
            self._by[expected] = found[0], found[1] - 1
        elif found is not None:
            del self._by[expected]
