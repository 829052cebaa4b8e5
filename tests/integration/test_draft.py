"""A draft model: any causal language model of the same vocabulary, in memory of its own."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from offload_moe import load
from offload_moe.engine.draft import draft_to_plan, find_draft, load_draft
from offload_moe.errors import ConfigError
from offload_moe.plan.hub import HubModel
from offload_moe.speculate.draft import DraftSource
from offload_moe.speculate.ngram import NgramSource
from offload_moe.speculate.speculation import speculation_of
from offload_moe.speculate.speculator import PassCost
from tests.support.chat import byte_tokenizer, chat_model, chat_store
from tests.support.cli import load_cli
from tests.support.guesses import compute_guesses

PROMPT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]


def write_draft(folder: Path, family: str = "llama", **changes: Any) -> Path:
    model = chat_model(family, **changes)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_draft(tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def every_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_guesses(monkeypatch)


def loaded_draft(folder: Path) -> Any:
    return load_draft(find_draft(folder), byte_tokenizer().get_vocab(), 512)


@torch.inference_mode()
def greedy(hf: Any, ids: list[int], number: int) -> list[int]:
    """Without a cache."""
    tokens = list(ids)
    for _ in range(number):
        tokens.append(int(hf(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


@torch.inference_mode()
def test_guesses_are_the_drafts_own_answer_whatever_came_of_earlier_ones() -> None:
    hf = chat_model()
    source = DraftSource(hf, 264)
    source.begin(PROMPT)
    ids = list(PROMPT)
    for number, num_right in ((3, 3), (7, 2), (1, 0), (5, 4), (2, 0)):
        guess = source.guess(number)
        assert list(guess.tokens) == greedy(hf, ids, number)
        for token in (*guess.tokens[:num_right], 77):
            ids.append(token)
            source.take(token)
    source.begin(ids[:14])
    assert list(source.guess(4).tokens) == greedy(hf, ids[:14], 4)


def test_a_long_prompt_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.speculate.draft.CHUNK", 4)
    hf, sizes = chat_model(), []
    hf.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    source = DraftSource(hf, 264)
    with torch.inference_mode():
        source.begin(PROMPT)
        source.guess(2)
    assert sizes == [4, 4, 2, 1, 1]


@torch.inference_mode()
def test_a_prompt_is_drafted_along_with_the_models_passes_and_kept_with_its_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offload_moe.speculate.draft.CHUNK", 4)
    hf, sizes, cache = chat_model(), list[int](), DynamicCache()
    hf.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    first, second = DraftSource(hf, 264), DraftSource(hf, 264)
    first.attach(cache)
    first.begin(PROMPT)
    assert sizes == []
    with first.passing(0, PROMPT[:6]):
        pass
    assert sizes == [4, 2]
    with first.passing(6, PROMPT[6:]):
        pass
    first.guess(1)
    assert sizes == [4, 2, 4, 1]
    sizes.clear()
    second.attach(copy.deepcopy(cache))
    second.begin([*PROMPT, 90, 91])
    assert list(second.guess(1).tokens) == greedy(hf, [*PROMPT, 90, 91], 1)
    assert sizes[0] == 2


@torch.inference_mode()
def test_a_draft_catches_up_apart_from_its_guesses() -> None:
    """Up to eight tokens the first guess takes along."""
    hf, drafting, sizes = chat_model(), chat_model(), list[int]()
    source = DraftSource(drafting, 264)
    source.begin(PROMPT)
    source.guess(1)
    drafting.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    for number, caught_up, expected in ((8, [], [8, 1]), (12, [11], [1, 1]), (40, [39], [1, 1])):
        for _ in range(number):
            source.take(77)
        assert (source.num_behind > 8) == bool(caught_up)
        source.catch_up()
        assert sizes == caught_up
        assert source.num_behind == 0
        source.guess(2)
        assert sizes == caught_up + expected
        sizes.clear()
    ids = [*PROMPT, *[77] * 60]
    assert list(source.guess(3).tokens) == greedy(hf, ids, 3)


@torch.inference_mode()
def test_a_draft_goes_on_behind_a_pass_that_was_stopped() -> None:
    hf, drafting = chat_model(), chat_model()
    source = DraftSource(drafting, 264)
    source.begin(PROMPT)
    source.guess(1)
    hook = (
        drafting.get_decoder().layers[-1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    )
    with pytest.raises(KeyboardInterrupt):
        source.guess(2)
    hook.remove()
    source.take(77)
    assert list(source.guess(4).tokens) == greedy(hf, [*PROMPT, 77], 4)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.2, "seed": 4}], ids=["greedy", "sampled"])
def test_answers_are_the_same(store: Path, draft: Path, settings: dict[str, Any], every_guess: None) -> None:
    with load(store, speculate="draft", draft=draft, context=512) as model:
        sessions = [model.chat(), model.chat()]
        for text in ("Hello", "Hello again", "And again"):
            answers = [
                "".join(piece.text for piece in session.send(text, max_new_tokens=20, speculate=choice, **settings))
                for session, choice in zip(sessions, ("draft", "off"), strict=True)
            ]
            assert answers[0] == answers[1]
            assert sessions[0].last_stats is not None
            assert sessions[0].last_stats.guesses is not None
            assert sessions[0].last_stats.guesses.num_guessed > 10


def test_a_model_that_drafts_for_itself_is_nearly_always_right(tmp_path: Path, every_guess: None) -> None:
    store = chat_store(tmp_path)
    with load(store, speculate="draft", draft=tmp_path / "model", context=512) as model:
        session = model.chat()
        assert len(list(session.send("Hello", max_new_tokens=60, temperature=0))) > 5
        assert session.last_stats is not None
        assert session.last_stats.guesses is not None
        assert session.last_stats.guesses.num_right > 0.5 * session.last_stats.guesses.num_guessed


def test_the_plan_counts_a_draft(store: Path, draft: Path) -> None:
    files = find_draft(draft)
    with load(store, context=512) as model:
        plain = model.placement.ram
    with load(store, speculate="draft", draft=draft, context=512) as model:
        parts = {part.name: part.num_bytes for part in model.placement.ram.fixed}
        assert parts["draft model"] == files.num_bytes(512)
        assert model.placement.ram.fixed_bytes == plain.fixed_bytes + files.num_bytes(512)
    assert files.num_bytes(1024) - files.num_bytes(512) == 512 * 2 * 2 * 16 * 2  # keys, values; layers; dims; bytes
    hf = loaded_draft(draft)
    weights = sum(value.nbytes for value in (*hf.parameters(), *hf.buffers()))
    assert files.num_bytes(0) == pytest.approx(weights, rel=0.05)


def test_a_model_without_that_draft_refuses_it(store: Path) -> None:
    with (
        load(store, context=512) as model,
        pytest.raises(ConfigError, match=r"draft.* speculate='draft' \(--speculate draft\)"),
    ):
        model.generate("Hi", speculate="draft")


@pytest.mark.parametrize("options", [{"speculate": "draft"}, {"draft": "x"}, {"draft": "x", "speculate": "off"}])
def test_a_draft_and_its_choice_come_together(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="come together"):
        load("demo", **options)


def test_what_cannot_draft_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a store"):
        find_draft(store)
    windows = write_draft(tmp_path / "windows", "gpt_oss")
    with pytest.raises(ConfigError, match="taken back"):
        find_draft(windows)
    other = write_draft(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"another vocabulary: 264 of its 265 tokens"):
        load(store, speculate="draft", draft=other, context=512)


def test_plan_reads_the_config_alone_of_a_draft_on_the_hub(
    store: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any other download fails."""
    shutil.copy(draft / "config.json", tmp_path)
    fetched: list[str] = []

    def fetch_config(repo_id: str, **keywords: Any) -> HubModel:
        fetched.append(repo_id)
        return HubModel(folder=tmp_path, sizes=None, tensor_names=())

    monkeypatch.setattr("offload_moe.engine.draft.fetch_config", fetch_config)
    assert draft_to_plan("organisation/small").num_bytes(512) == find_draft(draft).num_bytes(512)
    assert load_cli().main(["plan", str(store), "--draft", "organisation/small", "--context", "512"]) == 0
    assert "draft model" in capsys.readouterr().out
    assert fetched == ["organisation/small"] * 2


def test_a_draft_has_prompt_lookup_beside_it(store: Path, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated text is not left to the draft alone, which costs time for each guess."""
    used: list[tuple[int, ...]] = []
    guess = NgramSource.guess
    monkeypatch.setattr(
        NgramSource, "guess", lambda self, most: (found := guess(self, most), used.append(found.tokens))[0]
    )
    with load(store, speculate="draft", draft=draft, context=512) as model:
        speculator = speculation_of(model.hf).conversation()
        assert speculator is not None
        speculator.begin([5, 6, 7, 8, 9] * 3)
        speculator.note_plain(PassCost(1, 1.0, 0))
        speculator.take(5)
        assert used[-1][:2] == (6, 7)
        assert list(speculator.guess(3)) == [6, 7, 8]


def test_plan_shows_a_draft(store: Path, draft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_cli().main(["plan", str(store), "--draft", str(draft), "--context", "512"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "draft model" in line)
    assert "512 tokens" in line
