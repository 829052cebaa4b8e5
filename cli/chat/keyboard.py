"""The keyboard while an answer streams."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..terminal import is_dumb

PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Turn off the echo of typed keys; they stay in the queue for the next prompt.

    The terminal keeps marking pasted text, so that the prompt receives it as one text.
    """
    try:
        import termios
    except ImportError:
        # Windows echoes only while a line is read.
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

    # After `fg` the terminal has the shell's own settings.
    handler = signal.signal(signal.SIGCONT, silence)
    silence()
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, handler)
        with suppress(OSError, termios.error):  # it was closed
            _mark_pastes(PASTE_OFF)
            termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _mark_pastes(code: str) -> None:
    if not is_dumb():
        sys.stdout.write(code)
        sys.stdout.flush()
