"""Layers with different numbers of experts, as pruned models have them, through everything."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import card_model
from support.cuda import fake, shim
from support.families import eager_model, prompt_and_decode
from support.guesses import compute_guesses
from support.models import open_model
from support.offload import offload
from support.pressure import generate, scheduler_of
from support.pruned import SIZES, built_pruned, pruned_model
from support.tiny_models import tiny_prompt
from torch import Tensor

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.decode import pass_rows
from offload_moe.decode.span import LayerSpan
from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.plan.machine import Machine
from offload_moe.plan.plan import make_plan
from offload_moe.plan.simulation import plan_simulation_to_json, simulate_plan
from offload_moe.profile.belady import Belady
from offload_moe.profile.replay import parse_slots, replay
from offload_moe.profile.report import make_report, report_to_json
from offload_moe.profile.trace import Trace, load_trace, save_trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import POLICY_NAMES
from offload_moe.residency.popularity import POPULARITY_NAME, read_popularity
from offload_moe.residency.tier import Tier
from offload_moe.speculate.speculation import Speculation
from offload_moe.store import Store
from tests.integration import test_decode_rows as rows
from tests.integration.test_card_tokens import tokens_of
from tests.support.stores import check_all

FAMILIES = sorted(SIZES)
NUM_NEW = 8
SPANS = {"qwen3_moe": [1, 2], "mixtral": [1]}  # layers of the same size that follow each other


@pytest.fixture(scope="module", autouse=True)
def pruned() -> Iterator[None]:
    with built_pruned("qwen3_moe"), built_pruned("mixtral"):
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        pruned_model(family).to(torch.bfloat16).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def stores(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {family: quantize(path, path.with_name(f"{family}-nf4")) for family, path in checkpoints.items()}


@pytest.fixture(scope="module")
def trace(stores: dict[str, Path]) -> Trace:
    with open_model(stores["qwen3_moe"], 12) as model, model.trace() as recorder:
        greedy(model)
    return recorder.trace()


def greedy(model: Model, num_prompt: int = 9) -> Tensor:
    ids, mask = tiny_prompt(1, num_prompt)
    out = model.hf.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits)
    assert logits.abs().max() > 0.1
    return logits


def keys_of(family: str) -> ExpertKeys:
    return ExpertKeys(SIZES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_store_has_every_expert_and_no_other(family: str, stores: dict[str, Path]) -> None:
    store = Store.open(stores[family])
    check_all(store)
    assert [layer.num_experts for layer in store.layers] == SIZES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lossless_store_gives_the_bits_of_eager(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    store = quantize(checkpoints[family], tmp_path / "store", codec="bf16")
    expected = prompt_and_decode(eager_model(checkpoints[family]))
    assert expected.abs().max() > 0.1
    with open_model(store, 3, exact=True) as model:
        assert torch.equal(prompt_and_decode(model.hf), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_slots_and_lookahead_change_no_bit(
    family: str, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is long enough for all experts of the next layer to be prefetched where there is room."""
    spans: list[int] = []
    call = LayerSpan.pass_natively
    monkeypatch.setattr(
        LayerSpan, "pass_natively", lambda self, *given: spans.append(len(self.layers)) or call(self, *given)
    )
    with load(stores[family]) as model:
        expected = greedy(model, 40)
        assert model.engine.hierarchy.holds_every_expert
        bytes_with = model.placement.ram.bytes_with
    for num_slots, prefetch in ((1, 0), (3, 2), (8, 0), (10, 2)):
        with load(stores[family], ram=bytes_with(num_slots), prefetch=prefetch) as model:
            assert torch.equal(greedy(model, 40), expected), (num_slots, prefetch)
            assert model.stats.num_evictions > 0
            assert model.stats.num_prefetches > 0 if num_slots == 10 else prefetch or not model.stats.num_prefetches
    assert set(spans) == set(SPANS[family])


def test_several_rows_have_the_bits_of_each_alone(stores: dict[str, Path]) -> None:
    """Of one sequence, as guessed tokens are, and of several."""
    for num_slots in (12, 6):
        with open_model(stores["qwen3_moe"], num_slots) as model:
            expected, got = (rows.after_prompt(model) for _ in range(2))
            alone = rows.one_by_one(model, rows.NEXT[:5], expected)
            rows.check(rows.forward(model, rows.NEXT[:5], got), alone, [got, expected])
            pairs = [[rows.after_prompt(model, seed) for _ in range(2)] for seed in (1, 2)]
            each = torch.cat([rows.one_by_one(model, rows.NEXT[:1], second)[0] for _, second in pairs])
            with torch.inference_mode():
                together = pass_rows(model.hf, [(rows.NEXT[:1], first) for first, _ in pairs])
            assert together is not None
            rows.check([together], [each], [cache for pair in pairs for cache in pair])


def test_guesses_change_no_token(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compute_guesses(monkeypatch, 3)
    with open_model(stores["qwen3_moe"], 12) as model:
        expected = tokens_of(model.hf, max_new_tokens=24)
        counters = model.engine.hierarchy.counters
        speculator = Speculation(model.hf, "ngram", counters).conversation()
        assert tokens_of(model.hf, speculator=speculator, max_new_tokens=24) == expected
        assert 0 < counters.num_right_guesses < counters.num_guesses


@pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(("num_ram", "num_vram"), [(12, 12), (6, 5)])
def test_the_device_pass_chooses_the_cpus_tokens(num_ram: int, num_vram: int, stores: dict[str, Path]) -> None:
    with open_model(stores["mixtral"]) as model:
        expected = tokens_of(model.hf)
    with fake.FakeDriver() as driver, card_model(stores["mixtral"], driver, num_ram, num_vram) as card:
        assert tokens_of(card.hf) == expected
        assert len(set(expected)) > 2
        counters = card.engine.hierarchy.counters
        assert counters.num_chosen_on_card == len(expected) - 1
        card.card.settle()
        if num_vram < sum(SIZES["mixtral"]):
            assert counters.num_misses > 0


def test_guesses_by_habit_name_experts_that_their_layer_has(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(stores["qwen3_moe"]) as model:
        expected = greedy(model)
        ram = model.placement.ram.bytes_with(12)
    monkeypatch.setattr("offload_moe.engine.build.find_probes", lambda hf, layers: [None] * len(layers))
    monkeypatch.setattr("offload_moe.residency.co_occurrence.LEAST_TOKENS", 2)
    with load(stores["qwen3_moe"], ram=ram, prefetch=2) as model:
        assert torch.equal(greedy(model), expected)
        assert model.stats.num_prefetches > 0


def test_every_expert_can_be_here_at_once(stores: dict[str, Path]) -> None:
    """Then a token takes all layers of one size in one native call, which no slot table with gaps would allow."""
    with open_model(stores["qwen3_moe"]) as model:
        scheduler = model.engine.hierarchy.scheduler
        for layer, count in enumerate(SIZES["qwen3_moe"]):
            with scheduler.acquire(layer, range(count)) as lease:
                lease.bring()
        assert scheduler.residency.num_resident == keys_of("qwen3_moe").total
        if model.engine.hierarchy.slot_table is not None:
            assert model.engine.hierarchy.hold_every_expert()
            model.engine.hierarchy.release_every_expert()


def test_a_chunk_prefetches_what_the_next_layer_has(stores: dict[str, Path]) -> None:
    """The first layer is smaller than the second, and the fourth than the third."""
    keys = keys_of("qwen3_moe")
    with open_model(stores["qwen3_moe"], keys.total - 1, prefetch=1) as model:
        scheduler, brought = model.engine.hierarchy.scheduler, []
        prefetch = scheduler.prefetch
        scheduler.prefetch = lambda layer, experts, keep=(): (  # type: ignore[method-assign]
            brought.append((layer, list(experts))) or prefetch(layer, experts, keep)  # type: ignore[func-returns-value]
        )
        ids, _ = tiny_prompt(1, 40)
        model.hf(input_ids=ids)
        assert brought == [(layer, list(range(keys.num_experts[layer]))) for layer in range(1, keys.num_layers)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_tier_and_hybrid(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, keys = pruned_model(family), keys_of(family)
    observer, start, later = Observer(), Tier.start, []

    def noted(self: Tier, key: int, *given: Any, is_prefetch: bool = False) -> int | None:
        if is_prefetch:  # there is no lookahead: it is an expert that the CPU has just computed
            later.append(keys.layer_expert(key))
            assert later[-1] in observer.on_cpu
        return start(self, key, *given, is_prefetch=is_prefetch)

    def run(num_ram: int, num_device: int, latency_s: float, hybrid: Any) -> Tensor:
        copier = SimulatedCopier(latency_s=latency_s)
        attached, oracle = offload(model, "nf4", num_ram, copier, num_device, DeviceArithmetic, hybrid=hybrid)
        scheduler = scheduler_of(attached)
        scheduler.observer = observer
        found = generate(attached, num_tokens=8)
        torch.testing.assert_close(found, generate(oracle, num_tokens=8), rtol=1e-4, atol=1e-5)
        scheduler.close()
        return found

    expected = run(keys.total, keys.total, 0.0, "off")
    assert torch.equal(run(4, 2, 0.0, "off"), expected)
    monkeypatch.setattr(Tier, "start", noted)
    for _ in range(20):  # hybrid decides by measured times, so one run may copy everything at once
        run(keys.total, 4, 0.002, "on")
        if any(layer for layer, _ in later):
            return
    pytest.fail("no expert that the CPU computed was copied later")


class Observer:
    """What the CPU computed last, by layer and expert."""

    on_cpu: frozenset[tuple[int, int]] = frozenset()

    def acquired(self, layer: int, arriving: Any, missing: Any) -> None: ...

    def prefetched(self, layer: int, num_started: int) -> None: ...

    def computed_on_cpu(self, layer: int, experts: Any) -> None:
        self.on_cpu = frozenset((layer, expert) for expert in experts)


def test_what_was_used_is_remembered_by_layer(stores: dict[str, Path]) -> None:
    store, keys = stores["mixtral"], keys_of("mixtral")
    (store / POPULARITY_NAME).unlink(missing_ok=True)
    with load(store) as model:
        greedy(model)
        counts = {key: count for key, count in model.engine.hierarchy.scheduler.uses.counts.items() if round(count)}
    rows = json.loads((store / POPULARITY_NAME).read_text())["uses"]
    assert [len(row) for row in rows] == SIZES["mixtral"]
    assert read_popularity(store, keys) == counts
    assert sum(map(sum, rows)) > 0


def test_a_trace_knows_how_many_experts_each_layer_has(trace: Trace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "t.npz")
    again = load_trace(tmp_path / "t.npz")
    assert again.keys.num_experts == trace.keys.num_experts == tuple(SIZES["qwen3_moe"])
    assert again.num_experts == 8
    assert (again.experts.max(axis=(0, 2)) < SIZES["qwen3_moe"]).all()
    assert trace.outcomes is not None
    assert (trace.outcomes != 0).any()


@pytest.mark.parametrize("policy", [*POLICY_NAMES, Belady.name])
def test_a_replay_with_every_slot_misses_each_used_expert_once(policy: str, trace: Trace) -> None:
    used = {(layer, int(expert)) for token in trace.experts for layer, row in enumerate(token) for expert in row}
    assert parse_slots("100%", trace) == sum(SIZES["qwen3_moe"])
    for pool in ("global", "layer"):
        slots = 8 * trace.num_layers if pool == "layer" else trace.keys.total
        result = replay(trace, policy, num_slots=slots, pool=pool)
        assert result.num_accesses - result.num_hits == len(used)
        assert replay(trace, policy, num_slots=10, pool=pool).num_hits < result.num_hits


def test_the_report_counts_no_expert_that_a_layer_does_not_have(trace: Trace) -> None:
    report = make_report(trace, progress=lambda phase, done: None)
    json.dumps(report_to_json(report))
    sizes = SIZES["qwen3_moe"]
    assert [len(layer) for layer in report.balance.load] == sizes
    assert all(sum(layer) == pytest.approx(1) for layer in report.balance.load)
    used = [len(set(trace.experts[:, layer].ravel().tolist())) for layer in range(trace.num_layers)]
    assert [layer.num_dead for layer in report.balance.layers] == [
        size - n for size, n in zip(sizes, used, strict=True)
    ]


def test_a_plan_is_simulated_with_a_trace_and_without(
    trace: Trace, checkpoints: dict[str, Path], stores: dict[str, Path]
) -> None:
    machine = Machine(ram_bytes=1 << 30)
    for source in (checkpoints["qwen3_moe"], stores["qwen3_moe"]):
        plan = make_plan(source, machine, context=64)
        assert plan.shape.num_experts == sum(SIZES["qwen3_moe"])
        for routing in (None, trace):
            simulation = simulate_plan(plan, routing, prompt_tokens=4, num_tokens=8)
            assert simulation.pools.keys.num_experts == tuple(SIZES["qwen3_moe"])
            assert simulation.result.decode_tokens_per_s > 0
            assert plan_simulation_to_json(simulation)["pools"]["num_experts"] == 8
    with pytest.raises(ConfigError, match=r"layers of \[8, 8, 8, 8, 8\] experts, the model of \[5, 8, 8, 3, 6\]"):
        simulate_plan(plan, replace(trace, experts_per_layer=None))
    with pytest.raises(ConfigError, match="MoE layers"):
        simulate_plan(make_plan(checkpoints["mixtral"], machine, context=64), trace)
