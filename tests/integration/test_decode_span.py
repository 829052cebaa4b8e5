"""Rows of layers done at once: the same tokens, counters and traces as layer by layer, and only where nobody looks."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import open_model
from support.tiny_models import tiny_model, tiny_prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

from offload_moe.convert.quantize import quantize
from offload_moe.decode import plan as decode_plan
from offload_moe.decode.forward import DecoderForward
from offload_moe.decode.span import LayerSpan, span_kind
from offload_moe.engine.model import Model
from offload_moe.experts.lookahead import Lookahead
from offload_moe.experts.observer import HookObserver
from offload_moe.native import span as native_span
from offload_moe.native.kernels import MAX_TOP_K
from offload_moe.profile.trace import DELAYED_HIT, HIT, MISS
from offload_moe.residency.scheduler import Scheduler

FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe")
SHARED = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
NUM_PROMPT, NUM_NEW, NUM_LAYERS = 9, 12, 3
LEAST_SLOTS = 6  # twice a token's experts per layer
INT8_ROUNDING = 5e-2  # see test_decode


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    for family in FAMILIES:
        tiny_model(family, **(SHARED if family == "qwen2_moe" else {})).to(torch.bfloat16).save_pretrained(
            root / family
        )
    return {family: quantize(root / family, root / f"{family}-nf4", codec="nf4") for family in FAMILIES}


@pytest.fixture
def num_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every run."""
    calls: list[int] = []
    call = LayerSpan.pass_natively

    def counted(self: LayerSpan, *args: Any) -> Tensor:
        calls.append(len(self.layers))
        return call(self, *args)

    monkeypatch.setattr(LayerSpan, "pass_natively", counted)
    return calls


@pytest.fixture
def layer_by_layer() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_plan, "span_kind", lambda hierarchy, layer: None)
        yield patch


def generate(model: Model, seed: int = 0, **settings: Any) -> Any:
    ids, _ = tiny_prompt(1, NUM_PROMPT, seed)
    settings = {"max_new_tokens": NUM_NEW, "output_logits": True, **settings}
    return model.hf.generate(
        input_ids=ids,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        return_dict_in_generate=True,
        **settings,
    )


def logits(model: Model, **settings: Any) -> Tensor:
    out = generate(model, **settings)
    result = torch.stack(out.logits)
    assert result.abs().max() > 0.1
    return result


def counted(model: Model) -> dict[str, int]:
    counters = model.stats
    return {name: getattr(counters, name) for name in ("num_acquires", "num_hits", "num_misses", "num_evictions")}


def uses(model: Model) -> Counter[int]:
    """How often each expert was asked for; earlier sessions count too."""
    return Counter({key: int(count) for key, count in model.engine.hierarchy.scheduler.uses.counts.items()})


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_run_gives_the_bits_and_the_counts_of_its_layers(
    family: str, stores: dict[str, Path], num_runs: list[int], layer_by_layer: pytest.MonkeyPatch
) -> None:
    with open_model(stores[family]) as model:
        before = uses(model)
        expected, counts = logits(model), counted(model)
        used = uses(model) - before
        assert not num_runs
    layer_by_layer.undo()
    with open_model(stores[family]) as model:
        before = uses(model)
        assert torch.equal(logits(model), expected)
        # all forwards but the prompt
        assert num_runs == [NUM_LAYERS] * (NUM_NEW - 1)
        assert counted(model)["num_acquires"] == counts["num_acquires"]
        assert uses(model) - before == used


@pytest.mark.parametrize("num_slots", [1, LEAST_SLOTS - 1, LEAST_SLOTS, 12, 18])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_what_is_missing_is_brought_meanwhile(
    family: str, num_slots: int, stores: dict[str, Path], num_runs: list[int]
) -> None:
    with open_model(stores[family]) as model:
        expected = logits(model)
    num_runs.clear()
    with open_model(stores[family], num_slots, prefetch=0) as model:
        before = model.stats.copy()
        assert torch.equal(logits(model), expected)
        seen = model.stats.since(before)
        assert bool(num_runs) == (num_slots >= LEAST_SLOTS)
        assert seen.num_misses >= NUM_LAYERS * model.store.num_experts  # some in the prompt, others behind it
        assert seen.num_acquires == NUM_LAYERS * NUM_NEW
        residency = model.engine.hierarchy.scheduler.residency
        assert not any(residency.num_leases(slot) for slot in range(residency.num_slots))
        assert residency.num_reserved == 0
        assert seen.num_hits + seen.num_delayed_hits + seen.num_misses == seen.num_accesses
        assert seen.disk_bytes == seen.num_misses * model.engine.hierarchy.pools.slot_bytes


@pytest.mark.parametrize("factor", [1.001, 1e-5])
def test_routers_of_other_weights_take_part(factor: float, tmp_path: Path, num_runs: list[int]) -> None:
    """Weights that are no bf16 values, and experts that only rounding tells apart, as the demo's."""
    made = tiny_model("qwen3_moe")
    for layer in made.model.layers:
        layer.mlp.gate.weight.data.mul_(factor)
    made.save_pretrained(tmp_path / "source")
    store = quantize(tmp_path / "source", tmp_path / "store", codec="nf4")
    with open_model(store) as model:
        expected = logits(model)
    assert num_runs == [NUM_LAYERS] * (NUM_NEW - 1)
    for num_slots in (1, LEAST_SLOTS):
        with open_model(store, num_slots) as model:
            assert torch.equal(logits(model), expected)
    # with misses, lookahead learns from the first decode step which routers may be asked
    assert num_runs == [NUM_LAYERS] * (2 * (NUM_NEW - 1) - 1)


@pytest.mark.parametrize("num_slots", [LEAST_SLOTS, 12, 18])
def test_lookahead_goes_along(
    num_slots: int,
    stores: dict[str, Path],
    num_runs: list[int],
    layer_by_layer: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a run as layer by layer: the same guesses, judged alike, and the same tokens."""
    seen, passed = [], []
    note_passed = Lookahead.passed
    monkeypatch.setattr(Lookahead, "passed", lambda *args: (passed.append(1), note_passed(*args)))
    for _ in range(2):
        with open_model(stores["qwen3_moe"], num_slots, prefetch=1) as model:
            lookahead = model.engine.lookahead
            lookahead.governor = AlwaysOn()
            out = logits(model)
            tallies = [(tally.num_guessed, tally.num_right) for tally in lookahead.tallies]
            seen.append((out, tallies, lookahead.governor.num_tokens))
        layer_by_layer.undo()
    assert num_runs
    assert passed
    (expected, tallies, num_tokens), (got, in_run, num_in_run) = seen
    assert torch.equal(got, expected)
    assert in_run == tallies or num_slots == LEAST_SLOTS  # where nearly all is absent, it counts when one looks
    assert all(num_guessed for num_guessed, _ in tallies[1:])
    assert num_in_run == num_tokens == NUM_NEW - 1


class AlwaysOn:
    """A governor that does not govern."""

    num_tokens = 0

    def begin_token(self) -> bool:
        self.num_tokens += 1
        return True

    def pause(self) -> None: ...


def test_no_run_where_layers_are_looked_at(stores: dict[str, Path], num_runs: list[int]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        expected = logits(model)
        num_runs.clear()
        out = generate(model, output_hidden_states=True)
        assert not num_runs
        hidden = out.hidden_states[-1]
        assert len({tuple(each.flatten().tolist()) for each in hidden}) == NUM_LAYERS + 1
        distance = (torch.stack(out.logits) - expected).norm() / expected.norm()
        assert distance < INT8_ROUNDING  # modules that are looked at compute by themselves


def capture(model: Model, **flags: Any) -> Any:
    ids, _ = tiny_prompt(1, NUM_PROMPT, seed=3)
    return model.hf(input_ids=ids, **flags)


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_router_logits", "output_attentions"])
def test_what_one_call_captures_changes_no_later_one(flag: str, stores: dict[str, Path], num_runs: list[int]) -> None:
    """transformers leaves the hooks that it captures with where they are."""
    with open_model(stores["qwen2_moe"]) as model:
        logits(model)
        num_runs.clear()
        expected, num_expected = logits(model), len(num_runs)
        assert num_expected > 0
        captured = capture(model, **{flag: True})[flag.removeprefix("output_")]
        assert flag == "output_attentions" or all(each.abs().max() > 0 for each in captured)
        num_runs.clear()
        assert torch.equal(logits(model), expected)
        assert len(num_runs) == num_expected
        generate(model, **{flag: True})
        assert len(num_runs) == num_expected  # each step of this one is captured
        assert torch.equal(logits(model), expected)


def test_runs_rotate_by_the_length_of_the_sequence(tmp_path: Path, num_runs: list[int]) -> None:
    """Native steps around the window of a LongRoPE model, against the layers' own code on the whole sequence."""
    window, half = 32, 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": window,
        "short_factor": [1.0] * half,
        "long_factor": [8.0] * half,
    }
    tiny_model("qwen3_moe", rope_parameters=rope).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    store = quantize(tmp_path / "model", tmp_path / "store", codec="nf4")
    ids, _ = tiny_prompt(1, window - 4)
    with open_model(store) as model:
        out = model.hf.generate(
            ids,
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            disable_compile=True,
        )
        assert len(num_runs) > 5
    for step, got in enumerate(out.logits):
        with open_model(store, fast_path=False) as model:
            expected = model.hf(out.sequences[:, : ids.shape[1] + step]).logits[:, -1]
        assert expected.abs().max() > 0.1
        assert (got - expected).norm() < INT8_ROUNDING * expected.norm(), step


def test_a_scale_of_the_rotation_changes_beyond_the_window(tmp_path: Path, num_runs: list[int]) -> None:
    """As in the modules' steps: one bit of a router's logits may change a sparse mixer's weights by half."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "short_mscale": 1.1, "long_mscale": 1.6}
    tiny_model("phimoe", rope_parameters=rope).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    store = quantize(tmp_path / "model", tmp_path / "store", codec="nf4")
    ids, _ = tiny_prompt(1, 28)
    results = []
    for is_fast in (True, False):
        with open_model(store, fast_path=is_fast) as model:
            settings = {"do_sample": False, "eos_token_id": None, "disable_compile": True, "output_logits": True}
            out = model.hf.generate(ids, max_new_tokens=10, return_dict_in_generate=True, **settings)
            results.append(torch.stack(out.logits))
    assert len(num_runs) > 5
    assert results[1].abs().max() > 1
    assert (results[0] - results[1]).norm() < 1e-4 * results[1].norm()


def test_a_flag_in_the_config_counts_as_long_as_it_is_set(stores: dict[str, Path], num_runs: list[int]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        expected = logits(model)
        model.hf.config.output_hidden_states = True
        num_runs.clear()
        assert len(capture(model).hidden_states) == NUM_LAYERS + 1
        generate(model)
        assert not num_runs
        model.hf.config.output_hidden_states = False
        assert torch.equal(logits(model), expected)
        assert num_runs


def test_a_captured_call_that_fails_leaves_nothing_behind(stores: dict[str, Path], num_runs: list[int]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        expected = logits(model)

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        handle = model.hf.model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            capture(model, output_hidden_states=True)
        handle.remove()
        num_runs.clear()
        assert torch.equal(logits(model), expected)
        assert num_runs


def test_a_thread_that_captures_does_not_slow_another_one(stores: dict[str, Path], num_runs: list[int]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        expected = logits(model)
        capture(model, output_hidden_states=True)
        others: list[Tensor] = []

        class Onlooker(HookObserver):
            def __call__(self, *_: Any) -> None:
                if not others:
                    others.append(torch.empty(0))
                    thread = threading.Thread(target=lambda: others.append(logits(model)))
                    thread.start()
                    thread.join()

        handle = model.hf.model.layers[1].register_forward_pre_hook(Onlooker())
        num_runs.clear()
        hidden = capture(model, output_hidden_states=True).hidden_states
        handle.remove()
        assert len(hidden) == NUM_LAYERS + 1
        assert torch.equal(others[1], expected)
        assert num_runs


def test_captured_steps_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a loss every bit is, in a prompt and in decode steps, also after others that were not captured."""
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    with open_model(tmp_path, codec="bf16", exact=True) as model:
        settings = {"output_hidden_states": True, "output_router_logits": True, "max_new_tokens": 4}
        for _ in range(2):
            ours, theirs = generate(model, **settings), generate(SimpleNamespace(hf=reference.eval()), **settings)
            for got, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
            assert torch.stack(ours.logits).abs().max() > 0.1
            generate(model)


@pytest.mark.parametrize("part", ["layer", "attention", "norm", "router", "block", "experts", "shared", "gate"])
def test_a_stranger_s_hook_is_called(part: str, stores: dict[str, Path], num_runs: list[int]) -> None:
    with open_model(stores["qwen2_moe"]) as model:
        logits(model)
        num_runs.clear()
        layer = model.hf.model.layers[1]
        block = layer.mlp
        modules = {
            "layer": layer,
            "attention": layer.self_attn,
            "norm": layer.post_attention_layernorm,
            "router": block.gate,
            "block": block,
            "experts": block.experts,
            "shared": block.shared_expert,
            "gate": block.shared_expert_gate,
        }
        calls: list[int] = []
        handle = modules[part].register_forward_hook(lambda *_: calls.append(1))
        logits(model)
        assert len(calls) == NUM_NEW
        assert not num_runs
        handle.remove()
        logits(model)
        assert num_runs


def test_a_recorder_sees_in_a_run_what_it_sees_in_its_layers(
    stores: dict[str, Path], num_runs: list[int], layer_by_layer: pytest.MonkeyPatch
) -> None:
    traces = []
    for _ in range(2):
        with open_model(stores["qwen3_moe"], 12, prefetch=0) as model, model.trace() as recorder:
            generate(model)
            traces.append(recorder.trace())
        layer_by_layer.undo()
    assert num_runs
    expected, got = traces
    for name in ("experts", "weights", "router_probabilities", "token_ids"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
    assert (got.compute_s > 0).all()
    assert (got.compute_s.sum(axis=1) < got.forward_s.reshape(-1)).all()


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_recorder_counts_in_a_run_what_the_scheduler_counts(
    prefetch: int, stores: dict[str, Path], num_runs: list[int]
) -> None:
    with open_model(stores["qwen3_moe"], 12, prefetch=prefetch) as model, model.trace() as recorder:
        counts: list[Any] = []
        model.hf.register_forward_pre_hook(lambda *_: counts.append(model.stats.copy()))
        generate(model)
        first = 2 if prefetch else 1  # forward in a pass: lookahead learns from one which routers may be asked
        seen, trace = model.stats.since(counts[first]), recorder.trace()
        assert len(num_runs) == NUM_NEW - first
    outcomes = trace.outcomes[NUM_PROMPT + first - 1 :]
    assert (outcomes == MISS).sum() == seen.num_misses > 0
    assert (outcomes == DELAYED_HIT).sum() == seen.num_delayed_hits
    assert (outcomes == HIT).sum() == seen.num_hits > 0
    assert trace.loaded_bytes[first:].sum() == seen.disk_bytes
    assert trace.stall_s[first:].sum() == pytest.approx(seen.stall_s)
    assert trace.prefetch_issued[first:].sum() == seen.num_prefetches
    assert trace.prefetch_useful[first:].sum() == seen.num_useful_prefetches


def test_a_layer_with_another_forward_is_called(stores: dict[str, Path], num_runs: list[int]) -> None:
    """As libraries that wrap modules set it."""
    with open_model(stores["qwen3_moe"]) as model:
        expected = logits(model)
        num_runs.clear()
        second = model.hf.model.layers[1]
        forward = second.forward
        second.forward = lambda hidden, *args, **kwargs: forward(hidden * 1.5, *args, **kwargs)
        changed = logits(model)
        assert not num_runs
        assert not torch.equal(changed, expected)
        del second.forward
        assert torch.equal(logits(model), expected)
        assert num_runs


def test_what_others_bring_meanwhile_takes_nothing_from_a_run(
    stores: dict[str, Path], num_runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefetches of everything, again and again while passes are under way, evict nothing that they compute with."""
    is_over = threading.Event()
    num_started = [0]

    def prefetch_all(scheduler: Scheduler) -> None:
        while not is_over.is_set():
            for layer in range(NUM_LAYERS):
                num_started[0] += scheduler.prefetch(layer, range(scheduler.keys.num_experts[layer]))

    with open_model(stores["qwen3_moe"]) as model:
        expected = logits(model)
    with open_model(stores["qwen3_moe"], 12, prefetch=0) as model:
        others = threading.Thread(target=prefetch_all, args=[model.engine.hierarchy.scheduler])
        others.start()
        try:
            for number in range(40):
                assert torch.equal(logits(model), expected)
                if number >= 2 and num_started[0] > 3 * NUM_NEW:
                    break
        finally:
            is_over.set()
            others.join()
        assert num_runs
        assert num_started[0] > 3 * NUM_NEW


def test_a_pool_that_holds_every_expert_shrinks_between_tokens_only(
    stores: dict[str, Path], num_runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody gives memory back while a token passes: he waits for it, and the tokens are the same."""
    started, shrinkers = threading.Event(), []
    pass_through = native_span.SpanKernel.pass_through

    def and_shrink(self: native_span.SpanKernel, *args: Any) -> None:
        if not started.is_set():
            started.set()
            shrinkers.append(threading.Thread(target=model.engine.hierarchy.resize, args=["ram", 12]))
            shrinkers[0].start()
            time.sleep(0.05)
            assert model.engine.hierarchy.num_slots("ram") == NUM_LAYERS * model.store.num_experts
        pass_through(self, *args)

    with open_model(stores["qwen3_moe"]) as model:
        expected = logits(model)
        for layer in range(NUM_LAYERS):
            with model.engine.hierarchy.scheduler.acquire(layer, range(model.store.num_experts)) as lease:
                lease.bring()
        monkeypatch.setattr(native_span.SpanKernel, "pass_through", and_shrink)
        assert torch.equal(logits(model), expected)
        shrinkers[0].join()
        assert model.engine.hierarchy.num_slots("ram") == 12
        assert torch.equal(logits(model), expected)


def test_a_stop_within_a_token_takes_effect(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other time a run has nothing to say."""
    calls, say = [], native_span.TokenPass.next

    def say_at_times(token_pass: native_span.TokenPass, first: int) -> tuple[int, int] | None:
        calls.append(1)
        return say(token_pass, first) if len(calls) % 2 == 0 else None

    monkeypatch.setattr(native_span.TokenPass, "next", say_at_times)
    with open_model(stores["qwen3_moe"], LEAST_SLOTS, prefetch=0) as model:
        logits(model)
        assert spans(model)
        told: list[int] = []

        class Watch(HookObserver):
            def __init__(self, number: int) -> None:
                self.number = number

            def __call__(self, *_: object) -> None:
                told.append(self.number)

        for number, layer in enumerate(model.hf.model.layers):
            layer.register_forward_pre_hook(Watch(number))
        out = generate(model, max_new_tokens=2)
        assert out.sequences.shape[1] == NUM_PROMPT + 2
        assert told[:NUM_LAYERS] == [0, 1, 2]  # the prompt
        assert len(told) > 2 * NUM_LAYERS  # the token: each layer once, and again while it is waited for


def test_who_waits_for_slots_gets_them_when_a_run_is_left(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody gives memory back while a run waits for an expert, and the run is interrupted."""
    end = native_span.TokenPass.__exit__
    shrinkers: list[threading.Thread] = []

    def leave(self: LayerSpan, token_pass: native_span.TokenPass, *args: Any) -> None:
        residency = self._scheduler.residency
        assert token_pass.next(0) is not None
        assert any(residency.find(key) for key in residency.resident_keys() if self._slot_table.is_leased(key))
        shrinkers.append(threading.Thread(target=self._hierarchy.resize, args=["ram", 1]))
        shrinkers[0].start()
        raise KeyboardInterrupt

    def end_late(token_pass: native_span.TokenPass, *args: object) -> None:
        time.sleep(0.2)  # who has been told too early looks in vain
        end(token_pass, *args)

    with open_model(stores["qwen3_moe"], 18, prefetch=0) as model:
        logits(model)
        monkeypatch.setattr(LayerSpan, "_reserve", lambda self: None)
        monkeypatch.setattr(LayerSpan, "_serve", leave)
        monkeypatch.setattr(native_span.TokenPass, "__exit__", end_late)
        with pytest.raises(KeyboardInterrupt):
            logits(model, max_new_tokens=2)
        shrinkers[0].join(60)
        assert model.engine.hierarchy.num_slots("ram") == 1


def spans(model: Model) -> list[LayerSpan]:
    forward = model.hf.model.forward
    assert isinstance(forward, DecoderForward)
    return [stage for stage in forward.plan.stages if isinstance(stage, LayerSpan)]


def test_layers_with_other_routers_are_no_part_of_a_span(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        (span,) = spans(model)
        layers = span.layers
        assert len(layers) == NUM_LAYERS
        hierarchy, kind = model.engine.hierarchy, span_kind(model.engine.hierarchy, layers[0])
        assert kind is not None
        layers[2].plain.route.top_k = 2
        assert span_kind(hierarchy, layers[1]) == kind != span_kind(hierarchy, layers[2])
        modules = [layer.layer for layer in layers]
        lengths = [len(stage.layers) for stage in decode_plan.stages_of(modules, layers, hierarchy)]
        assert lengths == [2, 1]
        layers[1].plain.route.top_k = MAX_TOP_K + 1
        assert span_kind(hierarchy, layers[1]) is None
