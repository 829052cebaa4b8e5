"""Progress of long work on stderr: on a terminal a bar with rate and time left, else a line every ten seconds."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from offload_moe.system.progress import Progress
from offload_moe.system.sizes import format_size

from .streams import uses_unicode

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_INTERVAL_S = 10.0
# A rate over the first moments of a phase is not reliable.
SETTLE_S = 0.5


class Reporter(Progress, Protocol):
    """Shows progress, and notices, on stderr."""

    def notice(self, text: str) -> None:
        """Print a permanent line."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def reporter() -> Reporter:
    """A bar if stderr is a terminal, else lines."""
    if not sys.stderr.isatty():
        return LineReporter()
    # Printed before the slow import of rich; the bar reuses the line.
    print("Starting", end="\r", file=sys.stderr, flush=True)
    return BarReporter()


class Meter:
    """Rate and time left of one phase, without the work that was done before it began, as in a resumed run."""

    def __init__(self, done: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s = clock()
        self._begun_at = max(done, 0.0)

    def text(self, done: float, total: float | None) -> str:
        """Text such as `37%, 1.2 GiB of 3.3 GiB, 210 MiB/s, 12 s left`; unknown parts are left out."""
        if done < 0:
            return ""
        whole = total or 1.0
        parts = [f"{min(done / whole, 1.0):.0%}"]
        if total is not None:
            parts.append(f"{format_size(done)} of {format_size(total)}")
        elapsed_s = self._clock() - self._begun_s
        rate = (done - self._begun_at) / elapsed_s if elapsed_s > SETTLE_S else 0.0
        if rate > 0:
            parts += [f"{format_size(rate)}/s"] if total is not None else []
            parts.append(f"{format_duration(max(whole - done, 0.0) / rate)} left")
        return ", ".join(parts)


class LineReporter:
    """A line when a phase begins and every ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._said_s = 0.0
        self._meter = Meter(0.0, clock)

    def __call__(self, phase: str, done: float = -1.0, total: float | None = None) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._said_s, self._meter = phase, now, Meter(done, self._clock)
            print(f"{phase} ...", file=sys.stderr, flush=True)
        elif now - self._said_s >= LINE_INTERVAL_S and done >= 0:
            self._said_s = now
            print(f"{phase}: {self._meter.text(done, total)}", file=sys.stderr, flush=True)

    def notice(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class BarReporter:
    """One bar, replaced by the next phase's and removed from the screen at the end."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar

        from .terminal import console

        columns = (
            SpinnerColumn("dots" if uses_unicode(sys.stderr) else "line"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}", style="dim"),
        )
        self._bar = Bar(*columns, console=console(stderr=True), transient=True)
        self._task: TaskID | None = None
        self._phase = ""
        self._meter = Meter(0.0)

    def __call__(self, phase: str, done: float = -1.0, total: float | None = None) -> None:
        if phase != self._phase or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._phase, self._meter = phase, Meter(done)
            self._task = self._bar.add_task(phase, total=None, figures="")
        if done >= 0:
            figures = self._meter.text(done, total)
            self._bar.update(self._task, completed=done, total=total or 1.0, figures=figures)

    def notice(self, text: str) -> None:
        self._bar.console.print(text, style="bold yellow", soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def format_duration(seconds: float) -> str:
    """`12 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
