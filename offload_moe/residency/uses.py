"""Uses of each expert, so that the next session can begin with the most popular ones. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

HALF_LIFE_USES = 1 << 20  # routed experts after which a use counts half: about a thousand answers
COUNT_EVERY = 1 << 13  # uses, which are only kept until then: a token's are made fast


class Uses:
    """Counts of uses by key."""

    def __init__(self, counts: Mapping[int, float] | None = None) -> None:
        self._counts: dict[int, float] = dict(counts or {})
        self._latest: list[int] = []
        self._num_counted = 0

    def note(self, keys: Iterable[int]) -> None:
        """Count one acquire."""
        self._latest += keys
        if len(self._latest) >= COUNT_EVERY:
            self._counts, self._num_counted = self.counts, self._num_counted + len(self._latest)
            self._latest = []
        if self._num_counted >= HALF_LIFE_USES:
            self._num_counted = 0
            self._counts = {key: count / 2 for key, count in self._counts.items()}

    def restore(self, counts: Mapping[int, float]) -> None:
        """Add what an earlier session counted."""
        self._counts = _sum(self._counts, counts)

    @property
    def counts(self) -> dict[int, float]:
        """A copy of the counts."""
        return _sum(self._counts, Counter(self._latest))

    def most_used(self) -> Sequence[int]:
        """Keys by falling use; the lower key first where two are equal."""
        counts = self.counts
        return sorted(counts, key=lambda key: (-counts[key], key))


def _sum(counts: Mapping[int, float], more: Mapping[int, float]) -> dict[int, float]:
    return dict(counts) | {key: counts.get(key, 0.0) + count for key, count in more.items()}
