"""The tests of kernels on a driver: a real card's, or the fake one's.

They hand the kernels addresses of numbers that lie anywhere in Python's memory. So all of it comes out of the heap, in
one piece, which is page-locked: the card finds it at the same addresses. Linux with glibc; `PYTHONMALLOC=malloc`.
"""

import ctypes
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from offload_moe.card.launches import launch
from offload_moe.native.constants import CONSTANTS
from tests.support.cuda.direct import Direct, direct, is_wanted

HEAP_BYTES = 1 << 30
SETTINGS = {-4: 0, -8: 1, -1: -1}  # malloc.h: M_MMAP_MAX, M_ARENA_MAX, M_TRIM_THRESHOLD
_HOSTS_LINE = re.compile(r'^extern "C" __attribute__.*$', re.MULTILINE)
_CALL = re.compile(r"(\w+)\(([^()]*)\)|(\w+)")


class DriverLibrary:
    """A program of kernels on the card, in place of `shim.ShimLibrary`."""

    def __init__(self, text: str) -> None:
        card, _ = _card()
        self._module = card.session.load(card.device.compiler.image(_HOSTS_LINE.sub("", text)))

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], params: ctypes.Structure, *, seed: int = 0
    ) -> None:
        """Run a kernel and wait for it. seed: not used, because a card has an order of its own."""
        card, end = _card()
        assert _heap()[1] == end, f"more than {HEAP_BYTES >> 20} MiB of numbers: the card does not reach all of them"
        card.launch(self._module.function(name), grid, block[0], params)
        card.synchronize()


def evaluate(expression: str) -> int:
    """A product of numbers, constants and macros of the kernels' headers."""
    value = 1
    for name, arguments, plain in _CALL.findall(expression):
        if name:
            value *= launch(name, *(_number(part.strip()) for part in arguments.split(",")))
        else:
            value *= int(plain) if plain.isdigit() else launch(plain)
    return value


def _number(text: str) -> int:
    return int(text) if text.isdigit() else CONSTANTS[text]


def take_memory_from_heap() -> None:
    """From now on. Call it before numbers are made."""
    libc = ctypes.CDLL(None)
    for setting, value in SETTINGS.items():
        assert libc.mallopt(setting, value)
    libc.malloc.restype = ctypes.c_void_p
    libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(HEAP_BYTES))))


@cache
def _card() -> tuple[Direct, int]:
    """The card, which finds the heap at its addresses here, and where the heap ends."""
    assert os.environ.get("PYTHONMALLOC") == "malloc", "set PYTHONMALLOC=malloc: small objects lie elsewhere without it"
    card = direct()
    begin, end = _heap()
    card.session.driver.check(card.session.lock(begin, end - begin), "page-lock the heap")
    assert card.session.address_of(begin) == begin, "the card sees page-locked memory at other addresses"
    return card, end


def _heap() -> tuple[int, int]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    begin = next(line for line in lines if line.endswith("[heap]")).partition("-")[0]  # of several, with huge pages
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_void_p
    return int(begin, 16), int(libc.sbrk(ctypes.c_ssize_t(0)) or 0)


if is_wanted():
    take_memory_from_heap()
