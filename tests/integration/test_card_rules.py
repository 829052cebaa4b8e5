"""The rules that keep a pass of the card free of races: each test fails where its rule is taken away."""

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import CardModel, card_model, logits
from support.cuda import fake, shim
from support.models import open_model
from torch import Tensor

from offload_moe.card import cubins
from offload_moe.card.edits import Edits
from offload_moe.card.pool import CardPool
from offload_moe.card.stops import Stops
from offload_moe.card.worths import in_bytes
from offload_moe.native.constants import LOADING
from offload_moe.residency.policy import Appraising
from tests.integration.test_card_pass import ALL, TOP_K

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def expected(card_store: Path) -> Tensor:
    with open_model(card_store) as model:
        return logits(model.hf)


@pytest.fixture
def model(card_store: Path) -> Iterator[CardModel]:
    with fake.FakeDriver() as driver, card_model(card_store, driver, 12, 6) as model:
        model.card.mode.mode = "queued"
        yield model


def test_passes_have_names_for_a_profiler_where_it_is_wanted(model: CardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        names.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", noted)
    logits(model.hf, 2)
    assert not names
    monkeypatch.setenv("OFFLOAD_MOE_NVTX", "1")
    logits(model.hf, 2)
    assert names == ["forward by modules", "pass of 1, queued: queue", "pass of 1, queued: follow"]


def test_1_the_host_admits_nothing_while_the_pool_is_lent(model: CardModel) -> None:
    scheduler = model.engine.hierarchy.scheduler
    logits(model.hf)
    assert scheduler.residency.is_lent
    absent = next(key for key in range(ALL) if scheduler.residency.find(key) is None)
    layer, expert = scheduler.keys.layer_expert(absent)
    assert scheduler.prefetch(layer, [expert]) == 0
    with scheduler.acquire(layer, [expert]) as lease:
        assert [len(wave) for wave in lease] == [1]
        assert not scheduler.residency.is_lent


def test_3_what_is_on_its_way_is_published_when_it_is_there(model: CardModel) -> None:
    scheduler, pool = model.engine.hierarchy.scheduler, model.card.tables.pool
    model.card.recall()
    scheduler.prefetch(0, [1, 2])
    pool.lend(model.card.tables.edits)
    assert LOADING not in scheduler.residency.table.states
    assert all(pool.slot_of[key] == scheduler.residency.find(key) >= 0 for key in (1, 2))
    assert pool.num_owned == pool.num_slots


def test_6_a_ram_slot_stays_leased_until_the_edit_has_run(model: CardModel) -> None:
    ram, sources = model.engine.hierarchy.ram, model.card.tables.sources
    logits(model.hf)
    key = int(sources.is_published.nonzero()[0][0])
    slot = ram.residency.find(key)
    assert slot is not None
    assert ram.residency.num_leases(slot) == 1
    sources.withdraw_all(model.card.tables.edits)
    assert ram.residency.num_leases(slot) == 1
    model.card.end_loans()
    assert ram.residency.num_leases(slot) == 0


def test_the_card_has_the_worths_before_the_pass(model: CardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, known = model.engine.hierarchy.scheduler.residency.policy, []
    assert isinstance(policy, Appraising)
    original = CardPool.publish_worths

    def recorded(pool: CardPool, edits: Edits) -> None:
        known.append(in_bytes(policy.worths).tolist())
        original(pool, edits)

    monkeypatch.setattr(CardPool, "publish_worths", recorded)
    logits(model.hf)
    device = (ctypes.c_uint8 * ALL).from_address(model.card.tables.pool.tables.worth)
    assert list(device) == known[-1] != known[-2]


def test_9_a_stopped_pass_goes_on_behind_its_router(
    model: CardModel, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continuation launches the experts of the layer that stopped, and the graphs behind it: not its attention."""
    original, stops = Stops.make_possible, []

    def recorded(self: Stops, at: int, *args: Any) -> bool:
        stops.append(at)
        return original(self, at, *args)

    monkeypatch.setattr(Stops, "make_possible", recorded)
    model.driver.forget_counts()
    assert torch.equal(logits(model.hf), expected)
    assert len(stops) > 3
    assert len(set(stops)) > 1
    num_passes, num_layers = len(expected) - 1, len(model.card.parts.layers)
    continued = sum(2 * (num_layers - at) for at in stops)
    assert model.driver.count("cuGraphLaunch") == num_passes * (2 * num_layers + 2) + continued


MUTATIONS = {
    "8: finish in spite of stop": (
        "om_finish(const om_card_finish_params p) {\n    if (*p.pass.stop) return;",
        "om_finish(const om_card_finish_params p) {",
    ),
    "10: positions stay": ("p.state->positions[t] += p.state->advance[t];", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", list(MUTATIONS))
def test_a_kernel_without_the_rule_is_noticed(
    rule: str, card_store: Path, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    misses = outcome(card_store, expected)
    assert isinstance(misses, int)
    before, after = MUTATIONS[rule]
    shutil.copytree(cubins.KERNELS, tmp_path / "cuda")
    text = (tmp_path / "cuda" / "residency.cuh").read_text()
    assert text.count(before) == 1
    (tmp_path / "cuda" / "residency.cuh").write_text(text.replace(before, after))
    monkeypatch.setattr(cubins, "KERNELS", tmp_path / "cuda")
    assert outcome(card_store, expected) != misses


def outcome(card_store: Path, expected: Tensor) -> Any:
    """The number of misses and stops where all is well, else what is wrong."""
    driver = fake.FakeDriver()
    try:
        with card_model(card_store, driver, 12, TOP_K + 1) as model:
            model.card.mode.mode = "queued"
            found = logits(model.hf)
            misses = model.engine.hierarchy.counters.num_misses
    except Exception as error:
        return repr(error)
    problems = driver.problems()
    return problems or (misses if torch.equal(found, expected) else "other numbers")
