"""One thread computes for all requests: a bounded queue, first in, first out; the steps of those that run alternate.

A step is a token, or a chunk of a prompt, which takes as long as many: between two chunks, of whatever prompts, each
request that is behind its prompt has a step. Where alternating is of no use, the one that began first computes until it
ends, and the others wait for that.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

Work = Generator[None, None, None]
Result = TypeVar("Result")


class QueueFull(Exception):
    """No more requests may wait."""


class WorkerClosed(Exception):
    """No more requests are taken."""


class WaitForRoom(Exception):
    """Raised by the first step of a work that memory has no room for beside those that run: it waits for one to end."""


class Job:
    """A request's place in the queue, then in the engine. `stop` ends it, also in the middle of a prompt."""

    def __init__(self, begin: Callable[["Job"], Work], on_drop: Callable[[], object] = lambda: None) -> None:
        """on_drop: called when the worker is closed before the request began."""
        self.stop = threading.Event()
        self.began_at: float | None = None  # of `time.monotonic`; None while it waits
        self.is_in_prompt = True  # until its work says otherwise
        self.begin, self.on_drop = begin, on_drop
        self.work: Work | None = None


class _Call(Generic[Result]):
    """A function that the engine's thread calls between two steps."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.function, self.future = function, Future[Result]()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except BaseException as error:
            self.future.set_exception(error)


class Worker:
    """Begins its thread with the first request. Safe for several threads."""

    def __init__(
        self,
        *,
        parallel: int = 1,
        alternates: Callable[[], bool] = lambda: True,
        most_waiting: int = 64,
        idle_s: float | None = None,
        on_idle: Callable[[], object] = lambda: None,
    ) -> None:
        """parallel: requests whose steps alternate, while `alternates` says so.

        on_idle: called in the thread after `idle_s` without any work.
        """
        self.parallel, self.most_waiting = parallel, most_waiting
        self._alternates = alternates
        self._idle_s, self._on_idle = idle_s, on_idle
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: deque[Job] = deque()
        self._calls: deque[_Call[Any]] = deque()
        self._num_since_chunk = 0  # steps of requests behind their prompts
        self._is_short_of_room = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Put a request at the end of the queue.

        Raises:
            QueueFull: `most_waiting` requests wait already.
            WorkerClosed: it was closed.
        """
        with self._changed:
            self._check_open()
            # What can begin at once does not count as waiting.
            if len(self._waiting) >= self.most_waiting + max(0, self._most_running - len(self._running)):
                raise QueueFull
            self._waiting.append(job)
            self._wake()

    def cancel(self, job: Job) -> None:
        """End a request: at once where it waits, else within its step."""
        job.stop.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify_all()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Call a function in the engine's thread, between two steps. Raises: WorkerClosed."""
        call = _Call(function)
        with self._changed:
            self._check_open()
            self._calls.append(call)
            self._wake()
        return call.future

    def drain(self, limit_s: float) -> bool:
        """Wait until every request has ended; False after `limit_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._running, limit_s)

    def close(self) -> None:
        """Stop every request and end the thread."""
        with self._changed:
            self._is_closed = True
            for job in (*self._waiting, *self._running):
                job.stop.set()
            dropped = [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in dropped:
            job.on_drop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _check_open(self) -> None:
        if self._is_closed:
            raise WorkerClosed

    def _wake(self) -> None:
        """Lock held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="offload-moe engine", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                is_open = self._wait_for_work()
                calls = [*self._calls]
                self._calls.clear()
                if is_open and self._can_admit:
                    self._running.appendleft(self._waiting.popleft())  # the first whose turn comes
                job = self._next()
            for call in calls:
                call.run()
            if job is not None:
                self._advance(job)
            elif not is_open:
                return

    def _next(self) -> Job | None:
        """Lock held. The one whose step is next, which is put behind the others."""
        if not self._running:
            return None
        takes_turns = len(self._running) == 1 or self._alternates()
        job = self._in_turn() if takes_turns else min(self._running, key=_urgency)
        self._num_since_chunk = 0 if job.is_in_prompt else self._num_since_chunk + 1
        self._running.remove(job)
        self._running.append(job)
        return job

    def _in_turn(self) -> Job:
        """Lock held. The first one; a prompt only once every other request has had a step since the last chunk."""
        may_chunk = self._num_since_chunk >= sum(not job.is_in_prompt for job in self._running)
        return next(job for job in self._running if may_chunk or not job.is_in_prompt)

    def _wait_for_work(self) -> bool:
        """Lock held. False once it is closed."""
        idle_since = time.monotonic()
        while not (self._is_closed or self._running or self._calls or self._can_admit):
            left_s = None if self._idle_s is None else idle_since + self._idle_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                self._calls.append(_Call(self._on_idle))
                return True
            self._changed.wait(left_s)
        return not self._is_closed

    @property
    def _can_admit(self) -> bool:
        if not self._waiting or self._is_short_of_room:
            return False
        return not self._running or len(self._running) < self._most_running

    @property
    def _most_running(self) -> int:
        return self.parallel if self._alternates() else 1

    def _advance(self, job: Job) -> None:
        """One step of a request."""
        try:
            if job.work is None:
                job.began_at = time.monotonic()
                job.work = job.begin(job)
            next(job.work)
        except StopIteration:
            self._end(job)
        except WaitForRoom:
            self._put_back(job)
        except BaseException:
            logger.exception("A request failed outside of its own handling")
            self._end(job)

    def _end(self, job: Job) -> None:
        with self._changed:
            self._running.remove(job)
            self._is_short_of_room = False
            self._changed.notify_all()

    def _put_back(self, job: Job) -> None:
        job.work, job.began_at = None, None
        with self._changed:
            self._running.remove(job)
            if not job.stop.is_set():
                self._waiting.appendleft(job)
                self._is_short_of_room = bool(self._running)


def _urgency(job: Job) -> tuple[bool, float]:
    """Least for a request that is to be stopped, then for the one that began first."""
    return not job.stop.is_set(), math.inf if job.began_at is None else job.began_at
