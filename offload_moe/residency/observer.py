"""The interface of a recorder of what the scheduler of one tier does."""

from collections.abc import Sequence
from typing import Protocol


class Observer(Protocol):
    """Notes events. Called with the tier's lock held, from the acquiring thread: calls must return soon."""

    def acquired(self, layer: int, arriving: Sequence[int], missing: Sequence[int]) -> None:
        """A lease has begun. arriving: its experts that were on their way; missing: those that were absent."""

    def computed_on_cpu(self, layer: int, experts: Sequence[int]) -> None:
        """These experts are missing and are computed on the CPU; no lease of this tier includes them."""

    def prefetched(self, layer: int, num_started: int) -> None:
        """`num_started` experts of `layer` are on their way that are not demanded yet."""
