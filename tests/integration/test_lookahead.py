"""Lookahead prefetch on whole models: tokens never change, guesses are real, wrong ones are harmless."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.models import open_model
from support.tiny_models import FAMILIES, tiny_model, tiny_prompt

from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.experts.lookahead import Lookahead
from offload_moe.experts.probe import RouterProbe, find_probes
from offload_moe.residency.prefetch import LEAST_GUESSES, RankTally


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    for family in FAMILIES:
        tiny_model(family).to(torch.bfloat16).save_pretrained(root / family)
    return {family: quantize(root / family, root / f"{family}-store") for family in FAMILIES}


def greedy(model: Model) -> torch.Tensor:
    ids, mask = tiny_prompt(1, 9)
    return model.hf.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None, disable_compile=True
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tested_family_has_probes_whose_norm_is_the_right_one(family: str, stores: dict[str, Path]) -> None:
    with open_model(stores[family], 8, prefetch=2) as model:
        greedy(model)
        lookahead = lookahead_of(model)
        assert all(probe is not None for probe in lookahead._probes)
        assert lookahead._trusted
        assert all(lookahead._trusted.values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prefetch_changes_no_token(family: str, stores: dict[str, Path]) -> None:
    with open_model(stores[family], 8, prefetch=0) as model:
        expected = greedy(model)
        assert model.stats.num_prefetches == 0
    with open_model(stores[family], 8, prefetch=2) as model:
        assert torch.equal(greedy(model), expected)
        stats = model.stats
        assert stats.num_prefetches > 0
        assert 0 < stats.num_useful_prefetches <= stats.num_prefetches


def test_a_predictor_that_is_always_wrong_changes_no_token(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_model(stores["qwen3_moe"], 8, prefetch=0) as model:
        expected = greedy(model)
    monkeypatch.setattr("offload_moe.decode.plan.span_kind", lambda hierarchy, layer: None)  # spans route ahead
    monkeypatch.setattr(RouterProbe, "route", lambda self, residual, k: torch.tensor([[0, 1, 2][:k]]))
    with open_model(stores["qwen3_moe"], 8, prefetch=2) as model:
        assert torch.equal(greedy(model), expected)


def lookahead_of(model: Model) -> Lookahead:
    lookahead = model.engine.lookahead
    assert lookahead is not None
    return lookahead


def test_a_norm_that_is_not_the_right_one_is_noticed(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.experts.probe.NORM_NAMES", ("input_layernorm",))
    asked: list[int] = []
    monkeypatch.setattr(RouterProbe, "route", lambda self, residual, k: asked.append(k))
    with open_model(stores["mixtral"], 4, prefetch=2) as model:
        with torch.no_grad():
            for layer in model.hf.model.layers:
                layer.input_layernorm.weight.mul_(1.5)
        greedy(model)
        assert not any(lookahead_of(model)._trusted.values())
        assert not asked


def test_without_routers_to_ask_what_usually_follows_is_prefetched(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_model(stores["qwen3_moe"], 8, prefetch=0) as model:
        expected = greedy(model)
    monkeypatch.setattr("offload_moe.engine.build.find_probes", lambda hf, layers: [None] * len(layers))
    with open_model(stores["qwen3_moe"], 8, prefetch=2) as model:
        assert torch.equal(greedy(model), expected)
        assert model.stats.num_useful_prefetches > 0
        assert all(tally.num_routed > 0 for tally in lookahead_of(model).tallies[1:])


def test_guesses_are_tallied_by_layer(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"], 8, prefetch=2) as model:
        greedy(model)
        first, *others = model.lookahead_tallies
        assert first.num_guessed == 0  # nothing lies before the first layer
        for tally in others:
            assert 0 < tally.num_right <= tally.num_routed
            assert 0 < tally.recall <= 1
            assert 0 < tally.precision <= 1
            assert 0 <= tally.num_useful <= tally.num_fetched
        assert sum(tally.num_useful for tally in others) > 0
        assert sum(tally.num_fetched for tally in others) >= model.stats.num_prefetches


def test_a_family_without_a_router_beside_its_experts_has_no_probe() -> None:
    model = tiny_model("mixtral")
    from offload_moe.checkpoint.experts import find_experts

    layers = find_experts(model)
    for layer in model.model.layers:
        layer.mlp.unusual = layer.mlp.gate
        del layer.mlp.gate
    assert find_probes(model, layers) == [None] * len(layers)


def test_a_depth_whose_guesses_are_wrong_is_given_up(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.experts.lookahead.RETRY_TOKENS", 1000)
    asked: list[int] = []
    monkeypatch.setattr(RouterProbe, "predict", lambda self, residual, k: asked.append(1) or [])
    with open_model(stores["qwen3_moe"], 8, prefetch=2) as model:
        lookahead_of(model)._by_rank[0] = [RankTally(num_guessed=LEAST_GUESSES)]
        greedy(model)
        assert not asked


def test_only_ranks_that_are_often_right_are_fetched(stores: dict[str, Path]) -> None:
    """The second likeliest guess has been wrong: what is fetched is the likeliest, and all are judged."""
    with open_model(stores["qwen3_moe"], 8, prefetch=1) as model:
        lookahead = lookahead_of(model)
        fetched: list[int] = []
        bring = lookahead._bring

        def counted(layer: int, experts: Any, keep: set[int], *, to_device: bool = True) -> None:
            if len(experts) < lookahead._scheduler.keys.num_experts[layer]:  # not the whole layer, as for a prompt
                fetched.append(len(experts))
            bring(layer, experts, keep, to_device=to_device)

        lookahead._bring = counted
        tallies = [RankTally(), RankTally(num_guessed=10_000), RankTally()]
        lookahead._by_rank[0] = tallies
        greedy(model)
        assert set(fetched) == {1}
        assert all(tally.num_guessed > 0 for tally in tallies)
        assert tallies[1].num_guessed < 10_000  # recent guesses count more


def test_a_router_that_cannot_be_asked_leaves_the_guess_to_habits(stores: dict[str, Path], tmp_path: Path) -> None:
    settings = {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "use_expert_bias": True}
    settings |= {"num_experts": 8, "num_experts_per_tok": 3}
    tiny_model("lfm2_moe", **settings).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    store = quantize(tmp_path / "model", tmp_path / "store")
    with open_model(store, 8, prefetch=2) as model:
        assert lookahead_of(model)._probes == [None, None]
        greedy(model)
        assert model.stats.num_prefetches > 0


@pytest.mark.parametrize("family", ["minimax_m2", "hy_v3"])
def test_routers_that_take_more_than_hidden_states_are_asked_as_declared(family: str, tmp_path: Path) -> None:
    """Their block hands them a correction. Without it, asking them ended the first token whose experts were absent."""
    sizes = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}
    tiny_model(family, **sizes).to(torch.bfloat16).save_pretrained(tmp_path / family)
    store = quantize(tmp_path / family, tmp_path / "store")
    with open_model(store, 8, prefetch=0) as model:
        expected = greedy(model)
    with open_model(store, 8, prefetch=2) as model:
        assert torch.equal(greedy(model), expected)
        assert all(lookahead_of(model)._trusted.values())
        assert model.lookahead_tallies[-1].num_right > 0  # guessed by the routers: habits would fill no tally here
        assert lookahead_of(model)._habits is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of experts that torch computes
@pytest.mark.parametrize("family", ["axk2", "longcat_flash", "muse_spark", "zaya"])
def test_norms_of_other_shapes_change_no_token(family: str, tmp_path: Path) -> None:
    """Their weight lies further inside, or there are two of them, or it is of another width."""
    write_checkpoint(tmp_path / family, family)
    store = quantize(tmp_path / family, tmp_path / "store")
    tokens = torch.arange(3, 12)[None]
    answers = []
    for num_slots in (2, None):
        with open_model(store, num_slots, prefetch=2) as model:
            answers.append(model.hf.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert answers[0].shape == (1, 15)
    assert torch.equal(*answers)
