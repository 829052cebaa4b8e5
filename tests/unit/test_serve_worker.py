"""The engine's thread: order, turns, cancellation, calls between steps, idleness, and its end."""

import threading
import time
from itertools import pairwise

import pytest

from offload_moe.serve.worker import Job, QueueFull, WaitForRoom, Work, Worker, WorkerClosed

LIMIT_S = 10


@pytest.fixture
def log() -> list[str]:
    return []


def job(name: str, num_steps: int, log: list[str], gate: "threading.Event | Steps | None" = None) -> Job:
    def work(job: Job) -> Work:
        for step in range(num_steps):
            if gate is not None:
                gate.wait(LIMIT_S)
            if job.stop.is_set():
                log.append(f"{name} stopped")
                return
            log.append(f"{name}{step}")
            yield

    return Job(work)


def run(worker: Worker, jobs: list[Job]) -> None:
    for each in jobs:
        worker.submit(each)
    assert worker.drain(LIMIT_S)
    worker.close()


class Steps:
    """Steps of works wait until they are let through, one by one."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def wait(self, limit_s: float) -> bool:
        return self._permits.acquire(timeout=limit_s)

    def let_all_begin(self, worker: Worker, number: int) -> None:
        """One work begins at each turn, so all of them run after so many steps less one; then the next step waits."""
        self._permits.release(number - 1)
        while worker.num_running < number:
            time.sleep(0.001)

    def let_go_on(self) -> None:
        self._permits.release(1000)


def test_one_after_the_other(log: list[str]) -> None:
    gate = threading.Event()
    worker = Worker()
    jobs = [job(name, 2, log, gate) for name in "abc"]
    worker.submit(jobs[0])
    gate.set()
    run(worker, jobs[1:])
    assert log == ["a0", "a1", "b0", "b1", "c0", "c1"]


def test_steps_alternate_and_the_queue_moves_up(log: list[str]) -> None:
    gate = threading.Event()
    worker = Worker(parallel=2)
    jobs = [job(name, 2, log, gate) for name in "abc"]
    for each in jobs:
        worker.submit(each)
    time.sleep(0.05)
    gate.set()
    assert worker.drain(LIMIT_S)
    worker.close()
    assert log == ["a0", "b0", "a1", "b1", "c0", "c1"]


def test_one_chunk_of_a_prompt_between_two_tokens(log: list[str]) -> None:
    """However many prompts wait: a stream goes on at the pace of one chunk."""
    gate = Steps()

    def work(name: str, num_chunks: int) -> Job:
        def steps(job: Job) -> Work:
            for step in range(12):
                gate.wait(LIMIT_S)
                job.is_in_prompt = step < num_chunks
                log.append(f"{name}.chunk" if step < num_chunks else name)
                yield

        return Job(steps)

    worker = Worker(parallel=4)
    for each in (work("a", 0), work("b", 0), work("c", 3), work("d", 3)):
        worker.submit(each)
    gate.let_all_begin(worker, 4)
    gate.let_go_on()
    assert worker.drain(LIMIT_S)
    worker.close()
    streaming = log[log.index("b") : max(at for at, name in enumerate(log) if name == "a")]
    chunks = [at for at, name in enumerate(streaming) if name.endswith("chunk")]
    assert len(chunks) >= 4
    for first, second in pairwise(chunks):
        assert {"a", "b"} <= set(streaming[first:second])


def test_where_alternating_is_of_no_use_requests_come_one_after_the_other(log: list[str]) -> None:
    """None begins beside another; of those that run, the first goes on to its end."""
    gate, is_of_use = Steps(), threading.Event()
    worker = Worker(parallel=3, alternates=is_of_use.is_set)
    jobs = [job(name, 3, log, gate) for name in "abcd"]
    is_of_use.set()
    for each in jobs[:2]:
        worker.submit(each)
    gate.let_all_begin(worker, 2)
    is_of_use.clear()
    for each in jobs[2:]:
        worker.submit(each)
    gate.let_go_on()
    assert worker.drain(LIMIT_S)
    worker.close()
    assert [name for name in log if name[0] in "cd"] == ["c0", "c1", "c2", "d0", "d1", "d2"]
    assert log.index("c0") > max(log.index("a2"), log.index("b2"))


def test_a_stopped_request_does_not_wait_for_the_first_one(log: list[str]) -> None:
    gates, is_of_use = [threading.Event(), threading.Event()], threading.Event()
    worker = Worker(parallel=2, alternates=is_of_use.is_set)
    is_of_use.set()

    def first(job: Job) -> Work:
        yield
        gates[0].wait(LIMIT_S)
        is_of_use.clear()
        worker.cancel(second)
        yield
        log.append("first goes on")
        yield

    def stopping(job: Job) -> Work:
        gates[1].set()
        while not job.stop.is_set():
            yield
        log.append("second stopped")

    second = Job(stopping)
    worker.submit(Job(first))
    worker.submit(second)
    assert gates[1].wait(LIMIT_S)
    gates[0].set()
    assert worker.drain(LIMIT_S)
    worker.close()
    assert log == ["second stopped", "first goes on"]


def test_a_full_queue_refuses(log: list[str]) -> None:
    gate = threading.Event()
    worker = Worker(most_waiting=2)
    first = job("a", 1, log, gate)
    worker.submit(first)
    while worker.num_running == 0:
        time.sleep(0.001)
    for name in "bc":
        worker.submit(job(name, 1, log))
    with pytest.raises(QueueFull):
        worker.submit(job("d", 1, log))
    gate.set()
    assert worker.drain(LIMIT_S)
    worker.close()
    assert log == ["a0", "b0", "c0"]


def test_cancelling_removes_what_waits_and_stops_what_runs(log: list[str]) -> None:
    gate = threading.Event()
    worker = Worker()
    running, waiting = job("a", 3, log, gate), job("b", 1, log)
    worker.submit(running)
    while worker.num_running == 0:
        time.sleep(0.001)
    worker.submit(waiting)
    worker.cancel(waiting)
    assert worker.num_waiting == 0
    worker.cancel(running)
    gate.set()
    assert worker.drain(LIMIT_S)
    worker.close()
    assert log == ["a stopped"]


def test_calls_run_between_steps_in_the_same_thread() -> None:
    names: list[str] = []

    def work(job: Job) -> Work:
        for _ in range(2):
            names.append(threading.current_thread().name)
            yield

    worker = Worker()
    worker.submit(Job(work))
    names.append(worker.call(lambda: threading.current_thread().name).result(LIMIT_S))
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0).result(LIMIT_S)
    assert worker.drain(LIMIT_S)
    worker.close()
    assert set(names) == {"offload-moe engine"}


def test_a_work_without_room_keeps_its_place(log: list[str]) -> None:
    gate = threading.Event()
    worker = Worker(parallel=2)

    def hungry(job: Job) -> Work:
        if worker.num_running > 1:
            log.append("no room")
            raise WaitForRoom
        log.append("room")
        yield

    worker.submit(job("a", 1, log, gate))
    while worker.num_running == 0:
        time.sleep(0.001)
    worker.submit(Job(hungry))
    worker.submit(job("c", 1, log))
    gate.set()
    assert worker.drain(LIMIT_S)
    worker.close()
    assert log == ["a0", "no room", "room", "c0"] or log == ["a0", "room", "c0"]


def test_idleness_is_noticed_once_per_period() -> None:
    idle = threading.Event()
    worker = Worker(idle_s=0.05, on_idle=idle.set)
    worker.call(lambda: None).result(LIMIT_S)
    assert idle.wait(LIMIT_S)
    worker.close()


def test_a_failing_work_does_not_end_the_thread(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def broken(job: Job) -> Work:
        raise ValueError("broken")
        yield

    worker = Worker()
    run(worker, [Job(broken), job("b", 1, log)])
    assert log == ["b0"]
    assert "broken" in caplog.text


def test_closing_leaves_no_thread(log: list[str]) -> None:
    worker = Worker()
    worker.submit(job("a", 10**9, log))
    while not log:
        time.sleep(0.001)
    worker.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "offload-moe engine"]
    with pytest.raises(WorkerClosed):
        worker.submit(job("b", 1, log))
    with pytest.raises(WorkerClosed):
        worker.call(lambda: None)
