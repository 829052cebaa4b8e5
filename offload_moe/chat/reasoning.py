"""Separation of a model's reasoning from its answer while both stream.

Two conventions are in use: a pair of tags around the reasoning at the start of an answer (`<think>...</think>` and
variants), and the harmony format of gpt-oss, where every message names its channel.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["answer", "reasoning"]

TAG_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
)
HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it streams."""

    kind: Kind
    text: str


class Splitter(Protocol):
    """Turns text and special tokens into pieces. Special tokens outside its format are dropped."""

    @property
    def kind(self) -> Kind | None:
        """What the next text is; None where that is still open."""

    def text(self, text: str) -> list[Piece]: ...

    def marker(self, token: str) -> list[Piece]: ...

    def flush(self) -> list[Piece]: ...


def make_splitter(*, template: str | None, prompt: str, unfinished: str | None = None) -> Splitter:
    """The splitter for a chat template. `prompt` is the rendered prompt: a template may open the reasoning itself.

    unfinished: the beginning of the answer, where the model continues one.
    """
    if template is None:
        return PlainSplitter()
    if is_harmony(template):
        return HarmonySplitter(is_in_answer=unfinished is not None)
    if unfinished is not None:
        _, thought, closing = split_unfinished(unfinished)
        return PlainSplitter() if closing is None else TagSplitter(closing, has_begun=bool(thought.strip()))
    opened = next((pair for pair in TAG_PAIRS if prompt.rstrip().endswith(pair[0])), None)
    return TagSplitter(closing=opened[1] if opened is not None else None)


def is_harmony(template: str) -> bool:
    """Whether messages carry channels, as gpt-oss' do."""
    return "<|channel|>" in template and "<|message|>" in template


class PlainSplitter:
    """Everything is answer, to the last space."""

    kind: Kind | None = "answer"

    def text(self, text: str) -> list[Piece]:
        return [Piece("answer", text)] if text else []

    def marker(self, token: str) -> list[Piece]:
        return []

    def flush(self) -> list[Piece]:
        return []


class TagSplitter:
    """Reasoning between two tags before the answer. Later tags are ordinary text: an answer may quote them."""

    def __init__(self, closing: str | None = None, *, has_begun: bool = False) -> None:
        """closing: the tag that ends reasoning opened in the prompt. has_begun: the prompt has text of it already."""
        self._state: Literal["start", "reasoning", "answer"] = "start" if closing is None else "reasoning"
        self._closing = closing or ""
        self._held = ""
        self._has_begun = has_begun

    @property
    def kind(self) -> Kind | None:
        return None if self._state == "start" else self._state

    def text(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._leave_start()
        if self._state == "reasoning":
            pieces += self._reason()
        if self._state == "answer":
            pieces += self._give("answer", len(self._held))
        return pieces

    def marker(self, token: str) -> list[Piece]:
        is_tag = any(token in opening or token in closing for opening, closing in TAG_PAIRS)
        return self.text(token) if is_tag else []

    def flush(self) -> list[Piece]:
        return self._give("reasoning" if self._state == "reasoning" else "answer", len(self._held))

    def _leave_start(self) -> None:
        begun = self._held.lstrip()
        for opening, closing in TAG_PAIRS:
            if begun.startswith(opening):
                self._state, self._closing, self._held = "reasoning", closing, begun[len(opening) :]
                return
        if not any(opening.startswith(begun) for opening, _ in TAG_PAIRS):
            self._state = "answer"

    def _reason(self) -> list[Piece]:
        end = self._held.find(self._closing)
        if end < 0:
            return self._give("reasoning", len(self._held) - overlap(self._held, self._closing))
        pieces = self._give("reasoning", end)
        self._held = self._held[len(self._closing) :]
        self._state, self._has_begun = "answer", False
        return pieces

    def _give(self, kind: Kind, length: int) -> list[Piece]:
        """Take the first characters held, without the blank ones at the start of a section."""
        text, self._held = self._held[:length], self._held[length:]
        if not self._has_begun:
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        return [Piece(kind, text)] if text else []


class HarmonySplitter:
    """`<|channel|>NAME<|message|>TEXT<|end|>`: the channel `final` is the answer, the others are reasoning."""

    def __init__(self, *, is_in_answer: bool = False) -> None:
        self._kind: Kind = "answer"
        self._in_header = not is_in_answer
        self._channel = ""

    @property
    def kind(self) -> Kind | None:
        return None if self._in_header else self._kind

    def text(self, text: str) -> list[Piece]:
        if self._in_header:
            self._channel += text
            return []
        return [Piece(self._kind, text)] if text else []

    def marker(self, token: str) -> list[Piece]:
        if token == "<|message|>":
            is_aside = self._channel.strip().startswith(("analysis", "commentary"))
            self._kind, self._in_header = ("reasoning" if is_aside else "answer"), False
        elif token in HARMONY_MARKERS:
            self._in_header, self._channel = True, ""
        return []

    def flush(self) -> list[Piece]:
        return []


def split_unfinished(text: str) -> tuple[str, str, str | None]:
    """Answer and reasoning within the beginning of an answer, and the tag that closes the reasoning, if it is open."""
    for opening, closing in TAG_PAIRS:
        if text.rfind(opening) > text.rfind(closing):
            answer, _, reasoning = text.rpartition(opening)
            return answer, reasoning, closing
    return text, "", None


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `tag`."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
