"""What a recorder is told by the scheduler of one tier."""

from collections.abc import Sequence
from typing import Protocol


class Observer(Protocol):
    """Called with the tier's lock held, from the thread that asks: take note and return."""

    def acquired(self, layer: int, arriving: Sequence[int], missing: Sequence[int]) -> None:
        """A lease began. arriving: its experts on their way already; missing: those nobody has asked for before."""

    def computed_on_cpu(self, layer: int, experts: Sequence[int]) -> None:
        """These experts are missing and will be computed on the CPU; no lease of this tier has them."""

    def prefetched(self, layer: int, num_started: int) -> None:
        """Experts of `layer` that nobody asked for yet are on their way."""
