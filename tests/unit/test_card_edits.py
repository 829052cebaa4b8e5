"""Lists of edits: each number once, the last value of it, and the next list begins empty."""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from offload_moe.card import edits as module
from offload_moe.card.edits import Edits
from offload_moe.card.structs import constant, struct
from offload_moe.card.worths import MOST, in_bytes, in_groups

CAPACITY = 12


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> tuple[Edits, Any]:
    """Edits, and the array that the card reads."""
    memory = (struct("edit") * CAPACITY)()
    address = ctypes.addressof(memory)
    shared = SimpleNamespace(
        host=address, address=address, array=lambda dtype: np.frombuffer(memory, dtype=dtype), close=lambda: None
    )
    monkeypatch.setattr(module, "SharedMemory", lambda session, num_bytes: shared)
    session: Any = None
    return Edits(session, CAPACITY), memory


def taken(edits: Edits, memory: Any) -> list[tuple[int, int, int]]:
    """As native code takes them."""
    edits.give()
    count = ctypes.c_int64.from_address(edits.count_address)
    found = [(edit.kind, edit.index, edit.value) for edit in memory[: count.value]]
    count.value = 0
    return found


def many(edits: Edits, **values: int) -> None:
    indices = np.array([int(name[1:]) for name in values])
    edits.add_many("WORTHS", indices, np.array(list(values.values()), dtype=np.uint64))


def test_many_edits_stand_behind_single_ones_and_replace_earlier_ones(edits: tuple[Edits, Any]) -> None:
    listed, memory = edits
    token, worths = constant("OM_EDIT_TOKEN"), constant("OM_EDIT_WORTHS")
    many(listed, k0=5, k2=6)
    listed.add("TOKEN", 7, 0)
    many(listed, k2=8, k3=2**64 - 1)
    listed.add("TOKEN", 9, 0)
    assert taken(listed, memory) == [(token, 0, 9), (worths, 0, 5), (worths, 2, 8), (worths, 3, 2**64 - 1)]
    assert taken(listed, memory) == []
    many(listed, k2=1)
    assert taken(listed, memory) == [(worths, 2, 1)]


def test_edits_that_were_given_and_not_taken_stay(edits: tuple[Edits, Any]) -> None:
    listed, memory = edits
    token, stop, worths = (constant(f"OM_EDIT_{name}") for name in ("TOKEN", "STOP", "WORTHS"))
    many(listed, k0=5)
    listed.add("TOKEN", 7, 0)
    listed.give()
    listed.add("STOP", 0)
    assert taken(listed, memory) == [(token, 0, 7), (stop, 0, 0), (worths, 0, 5)]
    assert taken(listed, memory) == []


def test_the_greatest_worth_is_the_kernels() -> None:
    assert constant("OM_CARD_MOST_WORTH") == MOST == in_bytes(np.ones(1, np.float32))[0]


@pytest.mark.parametrize("num_keys", [1, 7, 8, 9])
def test_groups_are_whole(num_keys: int) -> None:
    worths = np.linspace(-1, 2, num_keys, dtype=np.float32)
    groups = in_groups(worths)
    assert len(groups) == -(-num_keys // 8)
    assert groups.view(np.uint8)[:num_keys].tolist() == [int(min(max(float(w), 0), 1) * 255) for w in worths]
    assert not groups.view(np.uint8)[num_keys:].any()
