"""The interface of what reads records into slots: native threads (`native.reads.Reads`), virtual time (`simulate/`)."""

from collections.abc import Sequence
from typing import Protocol

from offload_moe.native.kernels import Completion


class Reader(Protocol):
    """Queues of reads, demands before prefetches, and a queue of completions. Keys name records."""

    @property
    def num_completions(self) -> int:
        """Completions to drain."""

    def completions(self) -> Sequence[Completion]:
        """The completions since the last call, in the order in which they happened."""

    def submit(self, key: int, slot: int, *, is_prefetch: bool = False) -> None:
        """Queue the read of a record into a slot."""

    def demand(self, key: int) -> None:
        """Promote the read of an expert, if it is on its way: it overtakes prefetches and cannot be dropped."""

    def cancel(self, key: int) -> bool:
        """Cancel a submitted prefetch unless a part of it is being read. Returns whether it is cancelled."""

    def num_bytes(self, key: int) -> int:
        """Bytes of the expert's record."""

    def reserve(self, slot: int) -> None:
        """Reserve a slot for token passes."""

    def need_below(self, least_slots: int) -> None:
        """With fewer reserved slots left a token pass needs slots; guesses leave half of so many."""

    def reclaim(self) -> Sequence[int]:
        """Reclaim the slots that are reserved and not in use."""


class Waitable(Protocol):
    """A reader whose completions threads can wait for."""

    @property
    def num_wakes(self) -> int:
        """How often `wake` was called."""

    def wait(self, num_wakes: int, limit_s: float) -> None:
        """Wait until there are completions to drain, `num_wakes` has changed, or a moment has passed."""

    def wake(self) -> None:
        """End all calls of `wait`."""
