"""Which chunks of the RAM arena are page-locked, so that the device can read them directly.

A chunk is locked when the first copy out of it is issued: locking commits its pages, and a chunk that no copy reads
costs nothing.
"""

import logging
import threading
from typing import Protocol

import psutil
import torch
from torch import Tensor

from offload_moe.system.lifecycle import finalize
from offload_moe.system.sizes import format_size

SHARE_OF_RAM = 0.75  # locked pages are lost to all other uses of memory

logger = logging.getLogger(__name__)


class LockRuntime(Protocol):
    """The two calls of the device's runtime; a refused call leaves no error behind."""

    def register(self, address: int, num_bytes: int) -> int:
        """Lock the pages. Returns 0, or the runtime's error code."""
        ...

    def unregister(self, address: int) -> None: ...


class PageLock:
    """Locks chunks up to a limit, and none after the first refusal, which is logged once."""

    def __init__(self, runtime: LockRuntime | None, limit_bytes: int | None = None) -> None:
        """runtime: None where the device offers no page-locking of foreign memory."""
        self._runtime = runtime
        self._limit_bytes = int(SHARE_OF_RAM * psutil.virtual_memory().total) if limit_bytes is None else limit_bytes
        self._locked_bytes = 0
        self._locked: dict[int, torch.UntypedStorage] = {}  # kept alive: freeing locked memory would leave it locked
        self._refused: set[int] = set()
        self._lock = threading.Lock()
        if runtime is not None:
            finalize(self, _unlock_all, runtime, self._locked).atexit = False  # the end of the process unlocks, too

    @property
    def locked_bytes(self) -> int:
        return self._locked_bytes

    def holds(self, memory: Tensor) -> bool:
        """Whether the chunk this tensor is a part of is page-locked. The first call for a chunk tries to lock it."""
        chunk = memory.untyped_storage()
        address = chunk.data_ptr()
        with self._lock:
            if address not in self._locked and address not in self._refused:
                self._try(address, chunk)
            return address in self._locked

    def unlock(self, memory: Tensor) -> None:
        """Unlock the chunk this tensor is a part of, if it is locked. The next call of `holds` locks it again."""
        with self._lock:
            self._unlock(memory.untyped_storage().data_ptr())

    def close(self) -> None:
        with self._lock:
            for address in list(self._locked):
                self._unlock(address)

    def _unlock(self, address: int) -> None:
        chunk = self._locked.pop(address, None)
        if chunk is not None:
            assert self._runtime is not None
            self._runtime.unregister(address)
            self._locked_bytes -= chunk.nbytes()

    def _try(self, address: int, chunk: torch.UntypedStorage) -> None:
        if self._runtime is None or self._locked_bytes + chunk.nbytes() > self._limit_bytes:
            self._refused.add(address)
        elif code := self._runtime.register(address, chunk.nbytes()):
            self._refused.add(address)
            self._limit_bytes = 0
            logger.warning(
                "Page-locking %s of RAM was refused (error %d); what lies beyond the first %s is copied to the device "
                "through a small staging buffer, more slowly. On Linux raise `ulimit -l`; WSL2 and Windows lock only "
                "a part of RAM.",
                format_size(chunk.nbytes()),
                code,
                format_size(self._locked_bytes),
            )
        else:
            self._locked[address] = chunk
            self._locked_bytes += chunk.nbytes()


def _unlock_all(runtime: LockRuntime, locked: dict[int, torch.UntypedStorage]) -> None:
    while locked:
        runtime.unregister(locked.popitem()[0])
