"""What it takes until reads are queued for experts that a token pass needs from Python, for simulate_validation.py."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

from offload_moe.decode import span
from offload_moe.memory.disk import DiskMover
from offload_moe.native.kernels import SpanKernel, TokenPass
from offload_moe.residency.scheduler import Scheduler


@dataclass(slots=True)
class _Ask:
    at: float
    num_layers: int
    begun: list[float] = field(default_factory=list)


class AskWatch:
    """Times the requests of token passes."""

    def __init__(self) -> None:
        self.num_passes = 0
        self._drained_at = 0.0
        self._asks: list[_Ask] = []
        self._is_asked = False
        self._num_layers = 0  # accounted for last

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Of all models, so there should be one."""
        seen: list[tuple[Any, str, Callable[..., None]]] = [
            (SpanKernel, "start", self._see_start),
            (span, "note_passed", self._see_account),
            (Scheduler, "acquire", self._see_ask),
            (DiskMover, "start", self._see_read),
        ]
        with ExitStack() as stack:
            for owner, name, see in seen:
                stack.enter_context(patch.object(owner, name, _seen_by(see, getattr(owner, name))))
            stack.enter_context(patch.object(TokenPass, "next", self._drained_from(TokenPass.next)))
            yield

    def delays(self) -> list[tuple[int, int, float]]:
        """Layers that were accounted for first, how many asks had so many, and the median of the seconds from hearing
        of it until the last of the reads was queued.
        """
        delays: dict[int, list[float]] = defaultdict(list)
        for ask in self._asks:
            if ask.begun:
                delays[ask.num_layers].append(ask.begun[-1] - ask.at)
        return [(kind, len(seconds), statistics.median(seconds)) for kind, seconds in sorted(delays.items())]

    def _see_start(self, *_: Any) -> None:
        self.num_passes += 1

    def _drained_from(self, listen: Any) -> Any:
        def heard(*arguments: Any) -> Any:
            said = listen(*arguments)
            self._drained_at, self._is_asked, self._num_layers = time.perf_counter(), False, 0
            return said

        return heard

    def _see_ask(self, *_: Any, found: Any = None, **__: Any) -> None:
        if found is None:  # a prompt's layer, which no token pass waits for
            return
        self._is_asked = True
        self._asks.append(_Ask(self._drained_at, self._num_layers))

    def _see_account(self, _scheduler: Scheduler, _layer: int, choices: Sequence[Any], *_: Any) -> None:
        self._num_layers = len(choices)

    def _see_read(self, *_: Any, **__: Any) -> None:
        if self._is_asked:
            self._asks[-1].begun.append(time.perf_counter())


def _seen_by(see: Any, function: Any) -> Any:
    @wraps(function)
    def watched(*arguments: Any, **keywords: Any) -> Any:
        see(*arguments, **keywords)
        return function(*arguments, **keywords)

    return watched
