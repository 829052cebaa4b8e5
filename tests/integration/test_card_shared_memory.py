"""VRAM that other programs take while an answer is computed: slots give way between passes, and no token changes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_machine import Vram, card_machine
from support.cuda import shim
from support.models import open_model
from torch import Tensor

from offload_moe import load
from offload_moe.engine.model import Model
from offload_moe.memory.copier import DeviceMemory
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.plan import others
from tests.support.card_model import NUM_NEW, NUM_PROMPT, logits

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
SETTINGS: dict[str, Any] = {"prefetch": 0, "context": 256, "dense_codec": "int8"}
PLANNED, LEAST = 20, 9  # slots; the top-k experts of three layers


@pytest.fixture
def vram(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vram]:
    """A card with room for 20 experts' slots, one to a chunk, and nothing beside what was planned."""
    monkeypatch.setattr(others, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(others, "BACK_AFTER_S", 0.0)
    vram = Vram(slots_per_chunk=1)
    with card_machine(monkeypatch, vram):
        yield vram


@pytest.fixture
def model(vram: Vram, card_store: Path) -> Iterator[Model]:
    with load(card_store, **SETTINGS) as model:
        assert model.placement.vram is not None
        vram.budget_bytes = model.placement.vram.bytes_with(PLANNED)
    vram.copiers.clear()
    with load(card_store, **SETTINGS) as model:
        assert model.engine.hierarchy.num_slots("vram") == PLANNED
        assert str(model.fast_path).startswith("Decode takes the device pass through all")
        room = model.room
        vram.capacity_bytes = vram.copiers[0].num_allocated
        room.watch(lambda: with_planned(vram.copiers[0].memory(), room.planned_bytes))
        yield model


@pytest.fixture(scope="module")
def expected(card_store: Path) -> Tensor:
    with open_model(card_store) as model:
        return logits(model.hf)


def with_planned(memory: DeviceMemory, planned_bytes: int) -> DeviceMemory:
    """Beside the memory of slots, what contexts will have: on this machine that is the process's."""
    return DeviceMemory(available_bytes=memory.available_bytes + planned_bytes, used_bytes=memory.used_bytes)


def bytes_of(model: Model, num_slots: int) -> int:
    """So many slots, beyond what decode steps leave of the planned memory."""
    room = model.room
    return (
        num_slots * model.engine.hierarchy.pools.slot_bytes + room.planned_bytes - room.needed_bytes(NUM_PROMPT + 1, 1)
    )


def slots(model: Model) -> int:
    return model.engine.hierarchy.num_slots("vram")


@pytest.mark.parametrize(
    ("at", "num_taken", "mode"),
    [
        (2, 3, "stepwise"),
        *(
            pytest.param(at, num_taken, mode, marks=pytest.mark.slow)
            for at in range(NUM_NEW)
            for num_taken in (3, 100)
            for mode in ("queued", "stepwise")
        ),
    ],
)
def test_memory_that_is_taken_at_any_point_of_an_answer_changes_no_token(
    at: int, num_taken: int, mode: Any, model: Model, vram: Vram, expected: Tensor, caplog: Any
) -> None:
    """Taken behind so many tokens, and given back three tokens later: by then it may be the next answer's prompt."""
    card_of(model).mode.mode = mode
    seen: list[int] = []

    def elsewhere(*_: Any) -> None:
        is_taken = at <= len(seen) < at + 3
        vram.elsewhere_bytes = bytes_of(model, num_taken) if is_taken else 0
        seen.append(slots(model))

    model.hf.get_decoder().register_forward_pre_hook(elsewhere, prepend=True)
    with caplog.at_level(logging.WARNING, logger="offload_moe.plan.room"):
        assert torch.equal(logits(model.hf), expected)
    assert torch.equal(logits(model.hf), expected)
    assert slots(model) == PLANNED
    decoding = seen[:NUM_NEW]
    assert min(seen) == LEAST if num_taken == 100 else min(decoding) > LEAST and min(seen) < PLANNED
    assert caplog.messages[-1].startswith(f"Other programs have taken VRAM: {PLANNED - min(seen)} expert slots")


@pytest.mark.slow
def test_a_growth_that_the_card_refuses_is_left_for_later(
    model: Model, vram: Vram, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure says that there is room, and each allocation fails: others were faster."""
    vram.elsewhere_bytes = bytes_of(model, 4)
    assert torch.equal(logits(model.hf), expected)
    few = slots(model)
    assert LEAST <= few < PLANNED
    vram.elsewhere_bytes, refused = 0, []

    def refuse(self: SimulatedCopier, num_bytes: int) -> Any:
        refused.append(num_bytes)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedCopier, "allocate", refuse)
        assert torch.equal(logits(model.hf), expected)
    assert refused
    assert slots(model) == few
    assert torch.equal(logits(model.hf), expected)
    assert slots(model) == PLANNED


def card_of(model: Model) -> Any:
    return model.hf.get_decoder().forward.plan.card
