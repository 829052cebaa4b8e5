"""The device pass on the fake driver: the CPU's bits, whatever is resident, refused, late, stopped or given up."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import (
    FAMILIES,
    NUM_NEW,
    NUM_PROMPT,
    CardModel,
    card_model,
    check_tables,
    logits,
    store_of,
)
from support.cuda import fake, shim
from support.models import open_model
from support.tiny_models import tiny_prompt
from torch import Tensor
from transformers import DynamicCache

from offload_moe.card.edits import Edits
from offload_moe.card.stops import Stops
from offload_moe.decode.cache import give_room
from offload_moe.errors import BudgetError, DevicePassUnavailable, TransferError
from offload_moe.families.cache_name import with_cache

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

NUM_LAYERS, TOP_K, ALL = 3, 3, 24


@pytest.fixture(scope="module")
def expected(card_store: Path) -> Tensor:
    with open_model(card_store) as model:
        return logits(model.hf)


@pytest.fixture
def driver() -> Iterator[fake.FakeDriver]:
    with fake.FakeDriver() as driver:
        yield driver


@pytest.mark.parametrize("mode", ["queued", "stepwise"])
@pytest.mark.parametrize(("num_ram", "num_vram"), [(ALL, ALL), (ALL, TOP_K + 1), (6, TOP_K + 1), (1, 5)])
def test_the_bits_do_not_depend_on_where_experts_are(
    num_ram: int, num_vram: int, mode: Any, card_store: Path, expected: Tensor, driver: fake.FakeDriver
) -> None:
    with card_model(card_store, driver, num_ram, num_vram) as model:
        model.card.mode.mode = mode
        assert torch.equal(logits(model.hf), expected)
        check_tables(model)
        counters = model.engine.hierarchy.counters
        assert counters.num_hits + counters.num_misses == (NUM_NEW - 1) * NUM_LAYERS * TOP_K + prompt_accesses(model)
        assert (counters.num_computed_on_cpu > 0) == (mode == "stepwise")
        model.card.recall()
        assert not any(model.engine.hierarchy.scheduler.residency.num_leases(slot) for slot in range(num_vram))


def prompt_accesses(model: CardModel) -> int:
    """Experts that the prompt, computed by modules, has acquired."""
    counters = model.engine.hierarchy.counters
    return counters.num_hits + counters.num_misses - (NUM_NEW - 1) * NUM_LAYERS * TOP_K


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[1:]])
@pytest.mark.parametrize("mode", ["queued", "stepwise"])
def test_families(family: str, mode: Any, tmp_path: Path, driver: fake.FakeDriver) -> None:
    store = store_of(family, tmp_path)
    with open_model(store) as model:
        expected = logits(model.hf, 12)
    with card_model(store, driver, 12, 5) as model:
        model.card.mode.mode = mode
        assert torch.equal(logits(model.hf, 12), expected)
        check_tables(model)


@pytest.mark.parametrize(
    ("family", "shim_mode"),
    [
        ("deepseek_v3", "quick"),
        *(pytest.param(name, "race", marks=pytest.mark.slow) for name in ("deepseek_v3", "glm4_moe", "qwen2_moe")),
    ],
)
def test_dense_weights_that_are_not_quantized(
    family: str, shim_mode: str, tmp_path: Path, driver: fake.FakeDriver
) -> None:
    """A dense layer, shared experts with and without a gate, projections and the head, in bf16."""
    store = store_of(family, tmp_path)
    with open_model(store, dense_codec="bf16") as model:
        expected = logits(model.hf)
    with card_model(store, driver, 12, 5, dense_codec=None, shim_mode=shim_mode) as model:
        head = model.card.parts.head
        assert head is not None
        assert head.codec == "bf16"
        found = logits(model.hf)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_tokens_beyond_the_planned_context_take_the_modules(
    card_store: Path, expected: Tensor, driver: fake.FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_passed, passed = 2, []
    with card_model(card_store, driver, ALL, ALL, context=NUM_PROMPT + num_passed) as model:
        run = model.card.run
        monkeypatch.setattr(model.card, "run", lambda *rows: (passed.append(rows[1]), run(*rows))[1])
        found = logits(model.hf)
        assert torch.equal(found[: 1 + num_passed], expected[: 1 + num_passed])
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
        assert passed == [[NUM_PROMPT], [NUM_PROMPT + 1]]


def test_what_a_resident_token_costs(card_store: Path, driver: fake.FakeDriver) -> None:
    """Two graphs a layer, one at either end, a launch for a new id, one copy of the log; no synchronization."""
    with card_model(card_store, driver, ALL, ALL) as model:
        warm_up(model)
        driver.forget_counts()
        logits(model.hf, NUM_NEW)
        num_tokens = NUM_NEW - 1
        assert driver.count("cuGraphLaunch") == num_tokens * (2 * NUM_LAYERS + 2)
        assert num_tokens / 2 < driver.count("cuLaunchKernel") <= num_tokens
        assert driver.count("copies") == num_tokens
        assert driver.count("cuStreamSynchronize") == 0
        behind_prompt = driver.count("cuCtxSynchronize")
        assert behind_prompt == 3
        assert driver.count("synchronizations") == behind_prompt  # copies that wait are counted, too


def warm_up(model: CardModel) -> None:
    """Every expert on the card."""
    model.card.recall()
    scheduler = model.engine.hierarchy.scheduler
    for layer in range(NUM_LAYERS):
        with scheduler.acquire(layer, range(8)) as lease:
            for _ in lease:
                pass
            scheduler.settle()
    assert scheduler.residency.num_resident == ALL


@pytest.mark.parametrize(
    "options", [{"lockable": 100_000}, {"aliases": 1, "batches": 1}, {"late_copies": 1, "order": 7}]
)
def test_other_systems(options: dict[str, int], card_store: Path, expected: Tensor, driver: fake.FakeDriver) -> None:
    """Page locks refused, as on WSL2: then records are copied at stops. Addresses of the card's own. Any order."""
    driver.set(**options)
    with card_model(card_store, driver, ALL, 5) as model:
        model.card.mode.mode = "queued"
        assert torch.equal(logits(model.hf), expected)
        check_tables(model)
        assert (model.card.num_stops > 2 * NUM_LAYERS) == ("lockable" in options)


@pytest.mark.parametrize("num_rows", [2, pytest.param(3, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("num_vram", [ALL, 8])
def test_rows_of_one_sequence(num_rows: int, num_vram: int, card_store: Path, driver: fake.FakeDriver) -> None:
    ids, _ = tiny_prompt(1, NUM_PROMPT + num_rows, seed=1)
    with open_model(card_store) as model:
        expected = two_forwards(model.hf, ids)
    with card_model(card_store, driver, ALL, num_vram) as model:
        assert torch.equal(two_forwards(model.hf, ids), expected)
        check_tables(model)


def two_forwards(hf: Any, ids: Tensor) -> Tensor:
    """Hidden states of all tokens behind the prompt, which come at once."""
    cache = DynamicCache(config=hf.config)
    give_room(cache, 512, torch.bfloat16)
    with torch.inference_mode():
        hf(input_ids=ids[:, :NUM_PROMPT], **with_cache(cache), use_cache=True)
        found: Tensor = hf.get_decoder()(input_ids=ids[:, NUM_PROMPT:], **with_cache(cache), use_cache=True)[0]
    assert cache.get_seq_length() == ids.shape[1]
    return found


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("mode", ["queued", "stepwise"])
def test_a_pass_that_is_given_up_at_a_layer_leaves_nothing_behind(
    layer: int, mode: Any, card_store: Path, expected: Tensor, driver: fake.FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "make_possible" if mode == "queued" else "bring_to_ram"
    original: Callable[..., Any] = getattr(Stops, name)
    interrupted = []

    def interrupt(self: Stops, at: int, *args: Any) -> Any:
        if at == layer and not interrupted:
            interrupted.append(at)
            raise KeyboardInterrupt
        return original(self, at, *args)

    monkeypatch.setattr(Stops, name, interrupt)
    with card_model(card_store, driver, 6, 5) as model:
        model.card.mode.mode = mode
        with pytest.raises(KeyboardInterrupt):
            logits(model.hf, 20)
        check_tables(model)
        assert torch.equal(logits(model.hf), expected)
        check_tables(model)


def test_an_interrupt_before_edits_are_taken_loses_none(
    card_store: Path, expected: Tensor, driver: fake.FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that the card still reads, whose slot the host has given away, would be other weights."""
    original, left = Edits.give, [0]

    def interrupt(self: Edits) -> None:
        original(self)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Edits, "give", interrupt)
    with card_model(card_store, driver, 6, 5) as model:
        tables = model.card.tables
        model.card.mode.mode = "queued"
        for number in range(1, 9):
            left[0] = number
            with pytest.raises(KeyboardInterrupt):
                logits(model.hf)
            check_tables(model)
            sources = (ctypes.c_uint64 * ALL).from_address(tables.pool.tables.source)
            assert [source > 0 for source in sources] == tables.sources.is_published.tolist()
        left[0] = 0
        assert torch.equal(logits(model.hf), expected)


def test_the_pool_shrinks_and_grows_between_tokens(card_store: Path, driver: fake.FakeDriver) -> None:
    ids, _ = tiny_prompt(1, NUM_PROMPT + 4, seed=2)
    with open_model(card_store) as model:
        expected = token_by_token(model.hf, ids, lambda: None)
    with card_model(card_store, driver, ALL, 12, slots_per_chunk=4) as model:
        sizes = iter([8, 12, 4, 8])
        found = token_by_token(model.hf, ids, lambda: model.engine.hierarchy.resize("vram", next(sizes)))
        assert torch.equal(found, expected)
        check_tables(model)


def test_the_pool_grows_beyond_its_size_at_load(card_store: Path, driver: fake.FakeDriver) -> None:
    ids, _ = tiny_prompt(1, NUM_PROMPT + 4, seed=2)
    with open_model(card_store) as model:
        expected = token_by_token(model.hf, ids, lambda: None)
    with card_model(card_store, driver, ALL, 4, slots_per_chunk=4) as model:
        model.card.mode.mode = "queued"
        sizes = iter([16, 16, 8, ALL])
        found = token_by_token(model.hf, ids, lambda: model.engine.hierarchy.resize("vram", next(sizes)))
        assert torch.equal(found, expected)
        check_tables(model)
        assert model.card.tables.pool.num_owned == ALL
        assert max(model.card.tables.pool.slot_of) > 8


def test_the_pool_may_have_more_slots_than_there_are_experts(card_store: Path, driver: fake.FakeDriver) -> None:
    with open_model(card_store) as model:
        expected = logits(model.hf)
    with card_model(card_store, driver, ALL, 2 * ALL) as model:
        assert torch.equal(logits(model.hf), expected)
        check_tables(model)


def token_by_token(hf: Any, ids: Tensor, between: Callable[[], object]) -> Tensor:
    cache = DynamicCache(config=hf.config)
    give_room(cache, 512, torch.bfloat16)
    found = []
    with torch.inference_mode():
        hf(input_ids=ids[:, :NUM_PROMPT], **with_cache(cache), use_cache=True)
        for token in ids[:, NUM_PROMPT:].split(1, dim=1):
            between()
            found.append(hf.get_decoder()(input_ids=token, **with_cache(cache), use_cache=True)[0])
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("mode", ["queued", "stepwise"])
def test_a_lost_card_is_a_named_error(mode: Any, card_store: Path, driver: fake.FakeDriver) -> None:
    with card_model(card_store, driver, ALL, ALL) as model:
        model.card.mode.mode = mode
        logits(model.hf, 2)
        driver.set(lost_after=40)
        with pytest.raises(TransferError, match="The card was lost"):
            logits(model.hf)
        with pytest.raises(TransferError, match="The card was lost"):
            logits(model.hf)
        driver.set(lost_after=-1)


@pytest.mark.parametrize("call", ["cuMemHostAlloc", "cuModuleLoadData", "cuGraphInstantiateWithFlags"])
def test_what_the_driver_refuses_at_load_is_an_error_of_ours(
    call: str, card_store: Path, driver: fake.FakeDriver
) -> None:
    driver.fail(call, 2)
    with (
        pytest.raises((BudgetError, TransferError, DevicePassUnavailable), match="CUDA_ERROR_OUT_OF_MEMORY"),
        card_model(card_store, driver, ALL, ALL),
    ):
        pass
