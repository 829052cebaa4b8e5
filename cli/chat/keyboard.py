"""The keyboard while an answer streams."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keep what is typed meanwhile off the screen; it stays in line for the next prompt.

    The terminal goes on marking what is pasted, so that the prompt gets it as one text.
    """
    try:
        import termios
    except ImportError:
        # Windows shows nothing until a line is read.
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = [*before]
    quiet[0] = before[0] & ~termios.ICRNL
    quiet[3] = before[3] & ~(termios.ECHO | termios.ICANON)

    def silence(*_: object) -> None:
        termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
        _mark_pastes(PASTE_ON)

    # A shell that has the process in the foreground again leaves its own settings.
    handler = signal.signal(signal.SIGCONT, silence)
    silence()
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, handler)
        _mark_pastes(PASTE_OFF)
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _mark_pastes(code: str) -> None:
    if os.environ.get("TERM", "") not in ("dumb", "unknown"):
        sys.stdout.write(code)
        sys.stdout.flush()
