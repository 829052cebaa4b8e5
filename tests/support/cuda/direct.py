"""A driver called from Python, for what the product has no call for: single launches, copies that nothing waits for.

The card of `OM_CARD_DRIVER` (a path; empty: the system's driver), with NVRTC and the folder of cubins likewise.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from offload_moe.card.device import CardDevice
from offload_moe.native.structs import SessionStruct

SYSTEMS = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def is_wanted() -> bool:
    """Whether there is a driver to use."""
    return "OM_CARD_DRIVER" in os.environ


class Direct:
    """The driver's functions, by their names."""

    def __init__(self) -> None:
        path = os.environ["OM_CARD_DRIVER"] or None
        cubins = os.environ.get("OM_CARD_CUBINS")
        self.device = CardDevice.open(path, os.environ.get("OM_CARD_NVRTC") or None, Path(cubins) if cubins else None)
        self.session = self.device.session
        self.stream = ctypes.c_void_p(SessionStruct.from_address(self.session.address).stream)
        self._library = ctypes.CDLL(path or SYSTEMS)
        self.is_fake = hasattr(self._library, "omFakeReset")

    def call(self, name: str, *arguments: Any) -> None:
        """Raises: TransferError."""
        words = [ctypes.c_uint64(each) if isinstance(each, int) else each for each in arguments]
        self.session.driver.check(getattr(self._library, name)(*words), f"call {name}")

    def made(self, name: str, *arguments: Any) -> int:
        """What a call writes to its first parameter."""
        result = ctypes.c_uint64()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value

    def launch(self, function: int, grid: Sequence[int], threads: int, params: ctypes.Structure) -> None:
        """One kernel, which takes one struct."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        sizes = [ctypes.c_uint(size) for size in (*(*grid, 1, 1)[:3], threads, 1, 1, 0)]
        self.call("cuLaunchKernel", function, *sizes, self.stream, pointers, None)

    def launch_graph(self, executable: int) -> None:
        self.call("cuGraphLaunch", executable, self.stream)

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def query(self) -> None:
        """Submit what a driver would batch, whatever has run."""
        self._library.cuStreamQuery(self.stream)

    def free_bytes(self) -> int:
        """Memory of the card that nothing uses."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


@cache
def direct() -> Direct:
    """The card, opened once."""
    return Direct()
