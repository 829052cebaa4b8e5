"""Splits misses between copies to the device and compute on the CPU, so that both finish together.

Pure Python: seconds and experts, no bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from offload_moe.memory.pace import RunningCost

SPLITS_BETWEEN_TRIALS = 256  # after this many without work the CPU gets one expert, to measure its cost again


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Experts of one layer by side. link_s, cpu_s: expected seconds until each side is done."""

    copied: list[int] = field(default_factory=list)
    on_cpu: list[int] = field(default_factory=list)
    link_s: float = 0.0
    cpu_s: float = 0.0


class Balance:
    """Gives each miss to the side that is expected to finish it first, by the recent cost of an expert there."""

    def __init__(self, link: RunningCost) -> None:
        self.link = link
        self.cpu = RunningCost()
        self.unfinished: Callable[[], None] | None = None  # the work that is left once a layer's copies have landed
        self._num_splits_without_cpu = 0

    def finish(self) -> None:
        """Do the work that was left until the copies of the last layer had landed."""
        if self.unfinished is not None:
            self.unfinished()
            self.unfinished = None

    def split(
        self, absent: Sequence[int], arriving: Sequence[int] = (), unread: Sequence[int] = (), busy_s: float = 0.0
    ) -> Split:
        """Split the misses of one layer.

        absent: in RAM, not on the device. arriving: on their way, the last of them in `busy_s` seconds, for which the
        link is busy. unread: on disk only; while they are read one by one the link and the CPU become idle, so each
        goes where it is quicker. Arriving experts that are not given to the CPU are not listed.
        """
        link, cpu = self.link.seconds, self.cpu.seconds
        if link is None:
            return Split(copied=[*absent, *unread], link_s=busy_s)
        if cpu is None or self._num_splits_without_cpu >= SPLITS_BETWEEN_TRIALS:
            return self._trial(absent, unread, busy_s, link)
        link_s, cpu_s = busy_s, 0.0
        copied: list[int] = []
        on_cpu: list[int] = []
        for expert in arriving:
            if cpu_s + cpu < busy_s:
                on_cpu.append(expert)
                cpu_s += cpu
        for expert in absent:
            if cpu_s + cpu < link_s + link:
                on_cpu.append(expert)
                cpu_s += cpu
            else:
                copied.append(expert)
                link_s += link
        if cpu < link:
            on_cpu += unread
            cpu_s += cpu * len(unread)
        else:
            copied += unread
            link_s += link * len(unread)
        self._num_splits_without_cpu = 0 if on_cpu else self._num_splits_without_cpu + 1
        return Split(copied=copied, on_cpu=on_cpu, link_s=link_s, cpu_s=cpu_s)

    def _trial(self, absent: Sequence[int], unread: Sequence[int], busy_s: float, link: float) -> Split:
        """Give one expert to the CPU, whose cost is unmeasured or was measured long ago."""
        waiting = [*absent, *unread]
        if not waiting:
            return Split(link_s=busy_s)
        self._num_splits_without_cpu = 0
        copied = waiting[1:]
        return Split(
            copied=copied, on_cpu=waiting[:1], link_s=busy_s + link * len(copied), cpu_s=self.cpu.seconds or 0.0
        )
