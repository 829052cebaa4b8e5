"""Uses of each expert, so that the next session can begin with the most popular ones. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence

HALF_LIFE_USES = 1 << 20  # routed experts after which a use counts half: about a thousand answers


class Uses:
    """Counts of uses by key."""

    def __init__(self, counts: Mapping[int, float] | None = None) -> None:
        self._counts: dict[int, float] = dict(counts or {})
        self._num_noted = 0

    def note(self, keys: Iterable[int]) -> None:
        """Count one acquire."""
        counts = self._counts
        for key in keys:
            counts[key] = counts.get(key, 0.0) + 1.0
            self._num_noted += 1
        if self._num_noted >= HALF_LIFE_USES:
            self._num_noted = 0
            self._counts = {key: count / 2 for key, count in counts.items()}

    def restore(self, counts: Mapping[int, float]) -> None:
        """Add what an earlier session counted."""
        for key, count in counts.items():
            self._counts[key] = self._counts.get(key, 0.0) + count

    @property
    def counts(self) -> dict[int, float]:
        """A copy of the counts."""
        return dict(self._counts)

    def most_used(self) -> Sequence[int]:
        """Keys by falling use; the lower key first where two are equal."""
        return sorted(self._counts, key=lambda key: (-self._counts[key], key))
