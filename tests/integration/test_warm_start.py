"""A second session begins with what the first used most; a store that cannot be written, or a foreign file, is fine."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model, tiny_prompt

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.popularity import POPULARITY_NAME, read_popularity, write_popularity
from offload_moe.residency.scheduler import Scheduler
from offload_moe.store.installed import describe, remove


@pytest.fixture
def store(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return quantize(tmp_path / "model", tmp_path / "store")


def greedy(model: Model) -> torch.Tensor:
    ids, mask = tiny_prompt(1, 9)
    return model.hf.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, disable_compile=True
    )


def wait_for(condition: Callable[[], bool], scheduler: Scheduler) -> None:
    with scheduler.changed:
        assert scheduler.changed.wait_for(condition, 60)


def test_the_second_session_begins_warm_and_says_the_same(store: Path) -> None:
    with load(store) as model:
        cold = greedy(model)
        used = set(model.engine.hierarchy.ram.uses.counts)
        assert model.stats.num_misses > 0
    assert (store / POPULARITY_NAME).is_file()
    with load(store) as model:
        ram = model.engine.hierarchy.ram
        wait_for(lambda: used <= set(ram.residency.resident_keys()), ram)
        assert model.stats.num_misses == 0
        assert torch.equal(greedy(model), cold)
        assert model.stats.num_misses == 0
    remove(describe(store))  # the file is known to be ours
    assert not store.exists()


def test_the_most_used_come_first_and_nothing_is_evicted(store: Path) -> None:
    with load(store) as model:
        pools = model.engine.hierarchy.pools
        scheduler = model.engine.hierarchy.ram
        counts = {key: float(100 - key) for key in range(pools.keys.total)}
        scheduler.uses.restore(counts)
        assert list(scheduler.uses.most_used()) == sorted(counts)
        scheduler.fill(scheduler.uses.most_used())
        residency = scheduler.residency
        wait_for(lambda: residency.num_resident == min(len(counts), residency.num_slots), scheduler)
        assert residency.num_evictions == 0


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format version": 99, "uses": []}', "\x00\xff", None])
def test_a_file_that_says_nothing_is_passed_over(store: Path, content: str | None) -> None:
    if content is None:
        (store / POPULARITY_NAME).mkdir()
    else:
        (store / POPULARITY_NAME).write_text(content)
    assert read_popularity(store, ExpertKeys([8] * 4)) == {}
    with load(store) as model:
        greedy(model)


def test_a_store_that_may_not_be_written_is_left_as_it_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with load(store) as model:
        greedy(model)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            write_popularity(store, {0: 1.0}, ExpertKeys([8] * 4))
    assert not (store / (POPULARITY_NAME + ".part")).exists()


@pytest.mark.parametrize("has_pwrite", [True, False])
def test_what_is_written_is_read(tmp_path: Path, has_pwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_pwrite:
        monkeypatch.delattr(os, "pwrite")
    write_popularity(tmp_path, {0: 3.0, 5: 1.0}, ExpertKeys([3, 3]))
    assert json.loads((tmp_path / POPULARITY_NAME).read_text())["uses"] == [[3, 0, 0], [0, 0, 1]]
    assert read_popularity(tmp_path, ExpertKeys([3, 3])) == {0: 3.0, 5: 1.0}
    assert read_popularity(tmp_path, ExpertKeys([2, 2, 2])) == {}
