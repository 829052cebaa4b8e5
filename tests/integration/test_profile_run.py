"""`offload-moe profile` from a model on disk to the page: run, record, report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from support.tiny_models import FAMILIES, tiny_model

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.experts.probe import find_probes
from offload_moe.profile.prompts import GroupedPrompt
from offload_moe.profile.recall import DEPTHS
from offload_moe.profile.run import run_prompts
from offload_moe.profile.trace import Trace, load_trace
from tests.support.chat import VOCABULARY_SIZE, byte_tokenizer
from tests.support.cli import load_cli

PROMPTS = (GroupedPrompt(group="prose", text="Why is the sky blue"), GroupedPrompt(group="code", text="x = {1: 2}"))
NUM_NEW = 6


def quiet(phase: str, done: float) -> None:
    pass


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    for family in FAMILIES:
        model = tiny_model(family, vocab_size=VOCABULARY_SIZE, eos_token_id=None)
        model.to(torch.bfloat16).save_pretrained(root / family)
        byte_tokenizer().save_pretrained(root / family)
    return {family: quantize(root / family, root / f"{family}-nf4", codec="nf4") for family in FAMILIES}


@pytest.fixture
def model(stores: dict[str, Path]) -> Iterator[Model]:
    with load(stores["qwen3_moe"]) as opened:
        yield opened


@pytest.fixture
def trace(model: Model) -> Trace:
    return run_prompts(model, PROMPTS, max_new_tokens=NUM_NEW, progress=quiet)


class TestRun:
    def test_each_prompt_is_a_sequence_of_its_group(self, trace: Trace) -> None:
        assert len(trace.sequence_lengths) == 2
        assert json.loads(trace.metadata)["groups"] == ["prose", "code"]
        assert trace.is_prompt is not None
        assert (~trace.is_prompt).sum() == 2 * (NUM_NEW - 1)  # the first token comes from the prompt's forward

    def test_tokens_are_those_of_the_model(self, model: Model, trace: Trace) -> None:
        """What was recorded as generated is what the model says to that prompt without a recorder."""
        assert trace.token_ids is not None
        assert trace.is_prompt is not None
        rows = slice(trace.num_tokens - int(trace.sequence_lengths[1]), None)
        ids, is_prompt = trace.token_ids[rows], trace.is_prompt[rows]
        prompt = torch.from_numpy(ids[is_prompt].astype(np.int64))[None]
        said = model.hf.generate(input_ids=prompt, max_new_tokens=NUM_NEW - 1, do_sample=False, eos_token_id=None)
        assert said[0].tolist() == ids.tolist()

    def test_every_token_has_a_class(self, trace: Trace) -> None:
        classes = json.loads(trace.metadata)["token_classes"]
        known = {token for ids in classes.values() for token in ids}
        assert trace.token_ids is not None
        assert set(trace.token_ids.tolist()) == known
        assert classes["number"] == sorted(byte_tokenizer()("12", add_special_tokens=False)["input_ids"])

    def test_a_model_without_a_tokenizer_template_continues_the_text(self, model: Model) -> None:
        model.tokenizer.chat_template = None
        plain = run_prompts(model, PROMPTS[:1], max_new_tokens=3, progress=quiet)
        assert plain.sequence_lengths.tolist() == [len(PROMPTS[0].text) + 2]


class TestRecall:
    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_it_is_what_the_probes_foretell(self, family: str, stores: dict[str, Path]) -> None:
        """Once more by hand: hidden states from transformers itself, one layer and depth at a time."""
        with load(stores[family]) as model, torch.inference_mode():
            recorded = run_prompts(model, PROMPTS[:1], max_new_tokens=2, progress=quiet)
            found = json.loads(recorded.metadata)["lookahead_recall"]
            assert recorded.token_ids is not None
            ids = torch.from_numpy(recorded.token_ids[:24].astype(np.int64))[None]
            probes = find_probes(model.hf, model.layers)
            residuals: dict[int, Any] = {}
            for number, probe in enumerate(probes):
                assert probe is not None
                probe.norm.register_forward_pre_hook(
                    lambda _, args, number=number: residuals.__setitem__(number, args[0][0])
                )
            with model.trace() as recorder:
                model.hf(input_ids=ids, use_cache=False)
            chosen = recorder.trace().experts
        for depth in DEPTHS:
            for layer, recall in enumerate(found[str(depth)]):
                if recall is None:
                    assert layer < depth or layer - depth < 0
                    continue
                right = [
                    len(set(probes[layer].predict(residuals[layer - depth][t : t + 1], chosen.shape[2])) & set(row))
                    for t, row in enumerate(chosen[:, layer].tolist())
                ]
                assert recall == pytest.approx(sum(right) / chosen[:, layer].size)
        assert found["1"][1] is not None
        assert 0 < found["1"][1] < 1

    def test_a_router_that_was_asked_wrongly_is_left_out(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        from offload_moe.profile import recall

        def wrong(hf: Any, layers: Any) -> Any:
            probes = find_probes(hf, layers)
            probes[1].predict = lambda residual, k: list(range(k))  # type: ignore[union-attr]
            return probes

        monkeypatch.setattr(recall, "find_probes", wrong)
        found = json.loads(run_prompts(model, PROMPTS[:1], max_new_tokens=2, progress=quiet).metadata)
        assert found["lookahead_recall"]["1"] == [None, None, None]  # neither foretold nor foretelling
        assert found["lookahead_recall"]["2"][2] is not None


class TestCommandLine:
    def test_from_a_store_to_everything(
        self, stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "p.txt").write_text('Hello there\n{"prompt": "1 + 1 =", "group": "numbers"}\n')
        arguments = ["profile", str(stores["mixtral"]), "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "4"]
        outputs = ["--trace", str(tmp_path / "t.npz"), "--html", str(tmp_path / "r.html"), "--json"]
        assert load_cli().main([*arguments, *outputs]) == 0
        document = json.loads(capsys.readouterr().out)
        trace = load_trace(tmp_path / "t.npz")
        assert document["num_tokens"] == trace.num_tokens
        assert document["num_generated_tokens"] == 2 * 3
        assert document["costs"]["total"]["tiers"][0]["tier"] == "ram"
        assert [kind["name"] for kind in document["by_group"]] == ["no group", "numbers"]
        assert document["balance"]["layers"][0]["auxiliary_loss"] >= 0.5
        page = (tmp_path / "r.html").read_text()
        ElementTree.fromstring(page)
        assert f"{trace.num_tokens:,} tokens" in page

        assert load_cli().main([*arguments]) == 0
        shown = capsys.readouterr().out
        for text in ("Parts of a token's time", "computing experts", "belady", "Load of the experts", "numbers"):
            assert text in shown
        assert "…" not in shown

        assert load_cli().main(["profile", "--replay", str(tmp_path / "t.npz"), "--policy", "lru", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_tokens"] == trace.num_tokens
