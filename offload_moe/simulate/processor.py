"""Where the arithmetic runs: on the calling thread, or on a device beside it."""

from offload_moe.simulate.clock import VirtualClock


class Processor:
    """The calling thread of a machine without a device: arithmetic is done when the call returns."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.waited_s = 0.0  # the host for the device

    @property
    def done_at(self) -> float:
        """When everything issued so far is done."""
        return self._clock.now

    def run(self, host_s: float, compute_s: float) -> None:
        self._clock.advance(host_s + compute_s)

    def synchronize(self) -> None:
        """The host needs a result."""


class DeviceProcessor(Processor):
    """A queue of work: the host goes on at once, and waits when it needs a result."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self._done_at = 0.0

    @property
    def done_at(self) -> float:
        return self._done_at

    def run(self, host_s: float, compute_s: float) -> None:
        """The first operation is issued at once, the last one after `host_s`; the device is done after both."""
        begins = max(self._done_at, self._clock.now)
        self._clock.advance(host_s)
        self._done_at = max(begins + compute_s, self._clock.now)

    def synchronize(self) -> None:
        self.waited_s += max(0.0, self._done_at - self._clock.now)
        self._clock.advance_to(self._done_at)
