"""How a command ends: by SIGTERM and SIGHUP, on Windows by a console that is closed, as by Ctrl-C, so that the terminal
gets its echo back and no scratch files stay; and beside a load that goes on."""

import _thread
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from offload_moe.system import windows

WINDOWS_BREAK = "SIGBREAK"  # of Ctrl-Break, and of a console that is closed
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", WINDOWS_BREAK) if hasattr(signal, name)]
LOADING = "offload-moe-load"  # the name of a thread that loads a model


class EndedBySignal(BaseException):
    """Not an interrupt, which a chat survives."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number
        self.text = f"Stopped by {signal.Signals(number).name}."


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise EndedBySignal in place of being killed; a second signal kills. One that is ignored (nohup) stays so."""
    taken = [each for each in ENDING if signal.getsignal(each) is signal.SIG_DFL] if _is_main() else []
    for number in taken:
        signal.signal(number, _end)
    if windows.IS_WINDOWS:
        windows.on_closed_console(_break_main)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def end_beside_load(status: int) -> int:
    """The status; the process ends with it at once where a thread still loads.

    The interpreter's exit would stop the thread within libraries, some of which abort then.
    """
    if any(thread.name == LOADING for thread in threading.enumerate()):
        os._exit(status)
    return status


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _break_main() -> bool:
    """Raise SIGBREAK in the main thread. Returns whether something there ends by it."""
    number: signal.Signals = getattr(signal, WINDOWS_BREAK)
    if not callable(signal.getsignal(number)):
        return False
    _thread.interrupt_main(number)
    return True


def _end(number: int, frame: object) -> None:
    for each in ENDING:
        if signal.getsignal(each) is _end:
            signal.signal(each, _kill)
    raise EndedBySignal(number)


def _kill(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
