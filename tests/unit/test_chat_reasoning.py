"""Reasoning and answer told apart, however the text is cut."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_moe.chat.reasoning import (
    TAG_PAIRS,
    HarmonySplitter,
    Piece,
    PlainSplitter,
    Splitter,
    TagSplitter,
    make_splitter,
)

HARMONY_TEMPLATE = "<|start|>{{ m.role }}<|channel|>final<|message|>"


def joined(pieces: Iterable[Piece]) -> tuple[str, str]:
    sections = {"reasoning": "", "answer": ""}
    for piece in pieces:
        assert piece.text
        sections[piece.kind] += piece.text
    return sections["reasoning"], sections["answer"]


def feed(splitter: Splitter, parts: Iterable[str]) -> tuple[str, str]:
    pieces = [piece for part in parts for piece in splitter.text(part)]
    return joined([*pieces, *splitter.flush()])


@given(cuts=st.lists(st.integers(0, 60), max_size=8), pair=st.sampled_from(TAG_PAIRS))
def test_tags_are_found_however_the_text_is_cut(cuts: list[int], pair: tuple[str, str]) -> None:
    opening, closing = pair
    text = f"\n{opening}\nSo <b> then.{closing}\n\nFine </b> {opening} ok"
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in pairwise(bounds)]
    assert feed(TagSplitter(), parts) == ("So <b> then.", f"Fine </b> {opening} ok")


@pytest.mark.parametrize("text", ["plain", "<", "<thinking about it", "2 < 3", "[TH", " x"])
def test_an_answer_without_reasoning_is_whole(text: str) -> None:
    assert feed(TagSplitter(), text) == ("", text.lstrip())


def test_the_prompt_may_open_the_reasoning() -> None:
    splitter = make_splitter(template="...", prompt="<|im_start|>assistant\n<think>\n")
    assert feed(splitter, ["Hm", "m.</thi", "nk>\n\nYes"]) == ("Hmm.", "Yes")


def test_reasoning_that_never_ends_is_reasoning() -> None:
    assert feed(TagSplitter(), ["<think>on and on </th"]) == ("on and on </th", "")


def test_special_tokens_that_are_tags_count_and_others_vanish() -> None:
    splitter = TagSplitter()
    pieces = [*splitter.marker("[THINK]"), *splitter.text("a"), *splitter.marker("<|im_start|>"), *splitter.text("b")]
    pieces += [*splitter.marker("[/THINK]"), *splitter.text("c")]
    assert joined(pieces) == ("ab", "c")


def test_harmony_channels() -> None:
    splitter = make_splitter(template=HARMONY_TEMPLATE, prompt="<|start|>assistant")
    assert isinstance(splitter, HarmonySplitter)
    pieces = []
    for part in ["<|channel|>", "analysis", "<|message|>", "Let me", " see", "<|end|>", "<|start|>", "assistant"]:
        pieces += splitter.marker(part) if part.startswith("<|") else splitter.text(part)
    for part in ["<|channel|>", "fin", "al", "<|message|>", "Paris", "."]:
        pieces += splitter.marker(part) if part.startswith("<|") else splitter.text(part)
    assert joined([*pieces, *splitter.flush()]) == ("Let me see", "Paris.")


def test_without_a_template_everything_is_answer() -> None:
    splitter = make_splitter(template=None, prompt="x")
    assert isinstance(splitter, PlainSplitter)
    assert feed(splitter, [" <think>", " so "]) == ("", " <think> so ")
    assert splitter.marker("<s>") == []
