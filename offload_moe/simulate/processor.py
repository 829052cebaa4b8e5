"""The processor of the arithmetic: the calling thread, or a device that works concurrently."""

from offload_moe.simulate.clock import VirtualClock


class Processor:
    """The calling thread of a machine without a device: arithmetic ends before the call returns."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.waited_s = 0.0  # seconds for which the host waited for the device

    @property
    def done_at(self) -> float:
        """The end of everything issued so far."""
        return self._clock.now

    def run(self, host_s: float, compute_s: float) -> None:
        self._clock.advance(host_s + compute_s)

    def synchronize(self) -> None:
        """Wait for a result on the host."""


class DeviceProcessor(Processor):
    """A queue of work: the host continues at once, and waits when it needs a result."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self._done_at = 0.0

    @property
    def done_at(self) -> float:
        return self._done_at

    def run(self, host_s: float, compute_s: float) -> None:
        """The first operation is issued at once, the last one after `host_s`; the device ends after both."""
        begins = max(self._done_at, self._clock.now)
        self._clock.advance(host_s)
        self._done_at = max(begins + compute_s, self._clock.now)

    def synchronize(self) -> None:
        self.waited_s += max(0.0, self._done_at - self._clock.now)
        self._clock.advance_to(self._done_at)
