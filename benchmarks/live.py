"""Measured processes that stay loaded between trials: a request per line of stdin, an answer per line of stdout.

Needs the standard library only, as `harness` does.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

Answer = dict[str, Any]


class Engine(Protocol):
    """A loaded model."""

    def prompt(self, *, num_tokens: int, seed: int, all_cores: bool = False) -> Answer:
        """Compute a prompt in an empty context. all_cores: however many the engine is measured with."""

    def decode(self, *, num_tokens: int) -> Answer:
        """So many tokens more."""


def measured_runs(engine: Engine, options: Any) -> list[Answer]:
    """What a process of its own reports. The prompt gives the first token."""
    return [
        engine.prompt(num_tokens=options.prompt_tokens, seed=seed) | engine.decode(num_tokens=options.tokens - 1)
        for seed in range(options.runs)
    ]


class Answers:
    """The process that is asked. Made first of all, for libraries write to stdout too."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self, engine: object, loaded: Mapping[str, Any]) -> None:
        """`loaded` is the answer to nothing: what loading has cost."""
        self._write(loaded)
        for line in sys.stdin:
            request = json.loads(line)
            self._write(getattr(engine, request.pop("do"))(**request))

    def _write(self, answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=self._out, flush=True)


class Live:
    """One such process, from outside."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [*command, "--live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.loaded = self._read()

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Raises: RuntimeError with the end of stderr when the process has ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            message = self._errors.read()[-2000:]
            raise RuntimeError(f"{' '.join(self._command)} exited with {self._process.wait()}: {message}")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
