"""A link that takes the time of every byte and moves none, and the records behind it, for overlap.py."""

import time
from collections.abc import Sequence
from typing import Any


class AlwaysOn:
    """A governor that does not govern: the bound is for prefetch as it is asked for."""

    def begin_token(self) -> bool:
        return True

    def pause(self) -> None: ...


class SameRecord:
    """A RAM tier whose every record is the same, and already there when it is asked for."""

    def __init__(self, arena: Any, record: Any) -> None:
        from offload_moe.memory.workers import TransferWorkers

        self._arena, self._record = arena, record
        self._workers = TransferWorkers(1, "same-record")

    def start(self, key: int, slot: int, arrived: Any, *, is_prefetch: bool = False) -> None:
        self._workers.submit(slot, lambda: arrived(slot, self._record.numel(), None), is_prefetch=is_prefetch)

    def promote(self, slot: int) -> None: ...

    def cancel(self, slot: int) -> bool:
        return False

    def drain(self) -> None:
        pass

    def used(self, slots: Sequence[int]) -> None: ...

    def close(self) -> None:
        self._workers.close()


def silent_link(bytes_per_s: float) -> Any:
    """A simulated copier whose link takes the time of every byte, and neither moves one nor needs a thread for it."""
    from offload_moe.memory.simulated import SimulatedCopier

    class TimedStream:
        """Copies one behind the other; `free_at` is when the last one is done."""

        stream_id = 1
        free_at = 0.0

        def wait_event(self, event: "TimedEvent") -> None: ...  # of compute that was done when its call returned

        def close(self) -> None: ...

        def __enter__(self) -> "TimedStream":
            return self

        def __exit__(self, *exception: object) -> None: ...

    class TimedEvent:
        at = 0.0

        def record(self, stream: Any) -> None:
            self.at = getattr(stream, "free_at", 0.0)

        def synchronize(self, limit_s: float | None = None) -> None:
            while (left := self.at - time.perf_counter()) > 0:
                time.sleep(left)

    class SilentLink(SimulatedCopier):
        def new_stream(self) -> Any:
            return TimedStream()

        def new_event(self) -> Any:
            return TimedEvent()

        def issue_copy(self, source: Any, destination: Any) -> None:
            self._stream.free_at = max(time.perf_counter(), self._stream.free_at) + source.numel() / bytes_per_s

        def follow(self, copied: Any, limit_s: float) -> bool:
            copied.wait()
            return True

        def close(self) -> None:
            self.compute.close()

    return SilentLink()
