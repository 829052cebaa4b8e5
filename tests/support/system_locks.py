"""A card whose page locks are the system's, as a real driver's are: the limit of locked memory counts."""

import ctypes
import hashlib
import logging
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from offload_moe import load
from tests.support.card_machine import card_machine
from tests.support.card_model import SessionLocks, logits


class SystemLocks(SessionLocks):
    """Locks the pages in RAM before the fake driver takes them."""

    num_locked = 0
    sizes: ClassVar[dict[int, int]] = {}

    def register(self, address: int, num_bytes: int) -> int:
        library = ctypes.CDLL(None, use_errno=True)
        if library.mlock(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)):
            return ctypes.get_errno()
        SystemLocks.num_locked += 1
        self.sizes[address] = num_bytes
        return super().register(address, num_bytes)

    def unregister(self, address: int) -> None:
        super().unregister(address)
        ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(self.sizes.pop(address)))


def main(store: Path) -> None:
    """Print a digest of logits, and how many chunks of RAM were locked."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with (
        pytest.MonkeyPatch.context() as patch,
        card_machine(patch, page_locks=SystemLocks),
        load(store, context=256, dense_codec="int8") as model,
    ):
        print(hashlib.sha256(logits(model.hf).numpy().tobytes()).hexdigest(), SystemLocks.num_locked)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
