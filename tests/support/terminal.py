"""A program at a terminal of its own, driven and read by a test."""

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class Terminal:
    """Runs a command with a pseudo-terminal as its controlling one, so that Ctrl-C is an interrupt."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        # Ours stays open: with no end open for a moment, reading would say that the program has ended.
        self._master, self.slave = pty.openpty()
        # A session leader that opens a terminal gets it as its controlling terminal.
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.slave), *command],
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            # Tests that were started in the background of a shell would pass on that interrupts are ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.raw = ""
        self._seen = 0

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C once the line editor waits for a key: one that comes while it still echoes is seen with the next key.

        Source: CPython, Modules/readline.c, `readline_until_enter_or_signal`: nothing interrupts it before `select`.
        """
        program, deadline = psutil.Process(self.process.pid), time.monotonic() + 10
        num_asleep = 0
        while num_asleep < 3 and time.monotonic() < deadline:
            num_asleep = num_asleep + 1 if program.status() == psutil.STATUS_SLEEPING else 0
            time.sleep(0.01)
        self.send("\x03")

    def line(self, text: str) -> None:
        self.send(text + "\r")

    def expect(self, text: str, timeout_s: float = 60.0) -> str:
        """Read until `text` has appeared after what was read before; what came up to it, without escapes."""
        deadline = time.monotonic() + timeout_s
        while True:
            plain = _ESCAPES.sub("", self.raw[self._seen :]).replace("\r", "")
            if (position := plain.find(text)) >= 0:
                self._consume(plain[: position + len(text)])
                return plain[:position]
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"no {text!r} within {timeout_s} s, but {plain!r}")

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code, once the program has ended."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.1)
        while self._read(0.05):
            pass
        return self.process.wait(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)
        os.close(self.slave)

    def _consume(self, plain: str) -> None:
        """Move past the raw text whose plain form is `plain`."""
        end = self._seen
        while _ESCAPES.sub("", self.raw[self._seen : end]).replace("\r", "") != plain:
            end += 1
        self._seen = end

    def _read(self, timeout_s: float) -> bool:
        if timeout_s <= 0 or not select.select([self._master], [], [], timeout_s)[0]:
            return False
        self.raw += os.read(self._master, 65536).decode(errors="replace")
        return True
