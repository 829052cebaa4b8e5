"""Page-locking that is refused, capped or missing, with a runtime that only pretends; what a device says of itself."""

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from offload_moe.errors import BudgetError, ConfigError
from offload_moe.memory.arena import Arena
from offload_moe.memory.copier import CudaRuntime, compute_device, free_device_memory, total_device_memory
from offload_moe.memory.page_lock import PageLock

SLOT = 4096
CHUNK = 2 * SLOT


class FakeRuntime:
    """Locks as many chunks as it is told to, then refuses."""

    def __init__(self, num_chunks: int = 100) -> None:
        self.num_chunks = num_chunks
        self.asked: list[tuple[int, int]] = []
        self.locked: set[int] = set()

    def register(self, address: int, num_bytes: int) -> int:
        self.asked.append((address, num_bytes))
        if len(self.locked) == self.num_chunks:
            return 2
        assert address not in self.locked
        self.locked.add(address)
        return 0

    def unregister(self, address: int) -> None:
        self.locked.remove(address)


@pytest.fixture
def arena() -> Arena:
    return Arena(num_slots=6, slot_bytes=SLOT, chunk_bytes=CHUNK)


def test_a_chunk_is_locked_when_first_copied_from(arena: Arena) -> None:
    runtime = FakeRuntime()
    page_lock = PageLock(runtime)
    assert not runtime.asked
    assert page_lock.holds(arena.slot(1)[:100])
    assert page_lock.holds(arena.slot(0))
    assert runtime.asked == [(arena.slot(0).data_ptr(), CHUNK)]
    assert page_lock.holds(arena.slot(4))
    assert page_lock.locked_bytes == 2 * CHUNK
    page_lock.close()
    assert not runtime.locked


def test_after_a_refusal_nobody_asks_again_and_it_is_said_once(arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(num_chunks=1)
    page_lock = PageLock(runtime)
    assert [page_lock.holds(arena.slot(index)) for index in range(6)] == [True, True, False, False, False, False]
    assert len(runtime.asked) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "was refused (error 2)" in record.getMessage()
    assert "ulimit -l" in record.getMessage()
    page_lock.close()
    assert not runtime.locked


def test_no_more_than_the_limit_is_locked(arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime()
    page_lock = PageLock(runtime, limit_bytes=2 * CHUNK + 1)
    assert [page_lock.holds(arena.slot(index)) for index in (0, 2, 4)] == [True, True, False]
    assert len(runtime.asked) == 2
    assert not caplog.records


def test_without_a_runtime_nothing_is_locked(arena: Arena) -> None:
    page_lock = PageLock(None)
    assert not page_lock.holds(arena.slot(0))
    page_lock.close()


def test_threads_lock_a_chunk_once(arena: Arena) -> None:
    runtime = FakeRuntime()
    page_lock = PageLock(runtime)
    threads = [threading.Thread(target=page_lock.holds, args=(arena.slot(index % 2),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runtime.asked) == 1


def test_a_refused_call_drains_the_error_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    latched: list[int] = []

    def refuse(*_: object) -> int:
        latched.append(2)
        return 2

    class Launch:
        def fill_(self, value: int) -> None:
            if latched:
                raise RuntimeError(f"CUDA error {latched.pop()}")

    with torch.inference_mode():
        runtime = CudaRuntime(torch.device("cpu"))
    assert not runtime._scratch.is_inference()  # a loader thread could not write to it, and nothing would be drained
    monkeypatch.setattr(runtime, "_scratch", Launch())
    cudart = SimpleNamespace(cudaHostRegister=refuse, cudaHostUnregister=refuse)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    assert runtime.register(4096, 4096) == 2
    assert not latched
    runtime.unregister(4096)
    assert not latched


def test_the_default_device_is_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert compute_device() == compute_device("cuda") == torch.device("cuda:0")
    assert compute_device("cuda:1") == torch.device("cuda:1")
    assert compute_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"No device 'cuda:2' here\. Choose one of: cpu, cuda:0, cuda:1"):
        compute_device("cuda:2")


@pytest.mark.parametrize("found", [None, torch.device("mps")])
def test_without_a_supported_accelerator_it_is_the_cpu(
    found: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: int(found is not None))
    assert compute_device() == torch.device("cpu")
    for name in ("cuda", "mps", "nonsense"):
        with pytest.raises(ConfigError, match="Choose one of: cpu"):
            compute_device(name)


def test_free_memory_counts_what_the_allocator_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (1000, 5000))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: 100)
    assert free_device_memory(device) == 1200
    assert total_device_memory(device) == 5000

    def silent(_: object) -> None:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", silent)
    with pytest.raises(BudgetError, match="--vram"):
        free_device_memory(device)
