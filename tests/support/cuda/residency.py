"""A layer's part of a pass on the card: its tables, and the kernels that decide residency, executed on the CPU.

T rows, R the rows that memory is for, K experts of a row, H hidden.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from offload_moe.card.structs import constant, struct
from tests.support.cuda import shim
from tests.support.cuda.card import MODE, SOURCES, aligned, copied

EMPTY, HOSTS, HIT, MISSED, HEAD = (
    constant(f"OM_CARD_{name}") for name in ("EMPTY", "HOSTS", "HIT", "MISSED", "LOG_HEAD")
)
NUM_KEYS, NUM_SLOTS, TOP_K, LAYER, NUM_LAYERS, FIRST_KEY, HIDDEN = 16, 6, 4, 1, 3, 8, 150
FETCH_BLOCKS = 2
RECORD_BYTES = 16 * (FETCH_BLOCKS * 256 + 3)  # some threads copy twice
SLOT_BYTES = RECORD_BYTES + 16  # no record fills its slot
JUNK = 0x5A


QUICK = "quick" if MODE == "plain" else MODE


def build(folder: Path = SOURCES, *, mode: str = QUICK) -> shim.ShimLibrary:
    return shim.ShimLibrary(shim.build('#include "residency.cuh"\n', [f"-I{folder}"], mode=mode))


def junk(*shape: int, dtype: Any) -> np.ndarray:
    """Memory that nothing has written yet, which ends with its last element."""
    memory = aligned(int(np.prod(shape)), dtype)
    memory.view(np.uint8)[:] = JUNK
    return memory.reshape(shape)


def is_junk(memory: np.ndarray) -> bool:
    return bool((np.ascontiguousarray(memory).view(np.uint8) == JUNK).all())


class Layer:
    """The tables of a device, and rows of one layer: one, which chooses its first experts, unless there are `ids`."""

    def __init__(
        self,
        library: shim.ShimLibrary,
        key_of: list[int],
        used: list[int],
        *,
        token: int,
        ids: list[list[int]] | None = None,
        max_rows: int = 1,
        seed: int = 0,
    ) -> None:
        self.library, self.max_rows, self.seed = library, max_rows, seed
        self.ids = copied(np.array(ids or [range(TOP_K)], np.int32)).reshape(-1, TOP_K)
        num_rows, num_pairs = len(self.ids), max_rows * TOP_K
        self.state = struct("state")(
            num_rows=num_rows, token=token, num_owned=sum(key != HOSTS for key in key_of), num_slots=NUM_SLOTS
        )
        self.key_of, self.used = copied(np.array(key_of, np.int32)), copied(np.array(used, np.uint32))
        self.slot_of = copied(np.full(NUM_KEYS, -1, np.int32))
        for slot, key in enumerate(key_of):
            if key >= 0:
                self.slot_of[key] = slot
        self.slots = junk(NUM_SLOTS, SLOT_BYTES, dtype=np.uint8)
        self.records = copied(np.random.default_rng(0).integers(0, 256, (NUM_KEYS, RECORD_BYTES), np.uint8))
        self.records = self.records.reshape(NUM_KEYS, RECORD_BYTES)
        self.memory, self.source = (
            copied(np.array([each.ctypes.data for each in parts], np.uint64)) for parts in (self.slots, self.records)
        )
        self.worth = copied(np.zeros(NUM_KEYS, np.uint8))
        self.weights = copied(np.linspace(0.1, 0.9, num_rows * TOP_K, dtype=np.float32))
        self.normed = copied(np.random.default_rng(1).random((num_rows, HIDDEN), np.float32)).reshape(num_rows, HIDDEN)
        self.host_normed = junk(num_rows, HIDDEN, dtype=np.float32)
        self.hits, self.fetched = (junk(num_pairs, dtype=np.uint64) for _ in range(2))
        self.log = copied(np.full(HEAD + 6 * num_pairs, -1, np.int32))
        self.notice = junk(ctypes.sizeof(struct("notice")), dtype=np.uint8)
        self.fetches = junk(ctypes.sizeof(struct("fetches")), dtype=np.uint8)

    def run(self, kernel: str, *, blocks: tuple[int, ...] = (1,), threads: int = 256, **others: Any) -> None:
        """A kernel gets of all that there is what its parameters name."""
        params = struct(f"{kernel}_params")()
        tables = struct("tables")()
        for name in ("slot_of", "key_of", "used", "worth", "memory", "source"):
            setattr(tables, name, getattr(self, name).ctypes.data)
        state, kind = ctypes.addressof(self.state), type(self.state)
        values = {"pass": struct("pass")(stop=state + kind.stop.offset, num_rows=state + kind.num_rows.offset)}
        values |= {"state": state, "tables": tables, "first_key": FIRST_KEY, "layer": LAYER, "num_layers": NUM_LAYERS}
        values |= {"top_k": TOP_K, "max_rows": self.max_rows, "hidden": HIDDEN, "record_bytes": RECORD_BYTES}
        arrays = ("ids", "weights", "hits", "fetched", "fetches", "log", "notice", "normed", "host_normed")
        values |= {name: getattr(self, name).ctypes.data for name in arrays} | others
        for name, value in values.items():
            if hasattr(params, name):
                setattr(params, name, value)
        self.library.launch(f"om_{kernel}", blocks, (threads,), params, seed=self.seed)

    def resolve(self) -> None:
        self.run("resolve")

    def admit(self) -> None:
        self.run("admit")

    def fetch(self) -> None:
        self.run("fetch", blocks=(FETCH_BLOCKS, self.max_rows * TOP_K))

    def noticed(self, name: str) -> Any:
        """What the host reads."""
        value = getattr(struct("notice").from_buffer(self.notice), name)
        return np.ctypeslib.as_array(value) if isinstance(value, ctypes.Array) else value

    @property
    def found(self) -> list[int]:
        """Of each pair of one row, in the log."""
        most = self.max_rows * TOP_K
        return self.log[HEAD + 2 * most : HEAD + 2 * most + TOP_K].tolist()

    @property
    def changes(self) -> list[list[int]]:
        """Slot, key evicted and key admitted, in the log."""
        return self.log[HEAD + 3 * self.max_rows * TOP_K :][: 3 * self.log[1]].reshape(-1, 3).tolist()

    def victims(self) -> list[int]:
        """The slots that change, in their order, once both kernels have run."""
        self.resolve()
        self.admit()
        assert self.state.stop == 0
        assert [key for _, _, key in self.changes] == [FIRST_KEY + e for e in range(TOP_K) if self.found[e] != HIT]
        return [slot for slot, _, _ in self.changes]
