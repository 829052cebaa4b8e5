"""Answers on a terminal: words wrapped whole, Markdown rendered as it streams, nothing lost, nothing but text."""

import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest
from rich.cells import cell_len

from tests.support.cli import load_cli
from tests.support.screen import FakeScreen

load_cli()

from offload_moe_cli.render.screen import MarkdownScreen, WrappedScreen, answer_screen  # noqa: E402
from offload_moe_cli.render.wrap import WordWrapper  # noqa: E402

JOINED_EMOJI = pytest.mark.skipif(cell_len("👩‍👩‍👧") != 2, reason="this rich counts joined emoji one by one")
ANSWER = """\
# Experts and *routers*

A **router** chooses `top_k` experts. See [the paper](https://example.org/moe), List<String> and <b>tags</b>.
A second line, [red]not markup[/red] and snake_case_name, 2 ** 3 * 4.

- one
- two is **longer** and has so many words that it does not fit in one row of the screen
  - inner

1. first

2. second

```python
def double(value: int) -> int:
\tnote = "a string that is wider than the whole screen of this test"

    return value * 2
```

> quoted

日本語の文章は空白がないので、どこでも改行できます。ただし句読点は行頭に来ません。

[1]: https://example.org/reference ![chart](chart.png)
The last line 🙂 👍🏽"""


def pieces_of(text: str, seed: int) -> list[str]:
    """The text in pieces of one to nine characters."""
    draw, pieces = random.Random(seed), []
    while text:
        length = draw.randint(1, 9)
        pieces.append(text[:length])
        text = text[length:]
    return pieces


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> FakeScreen:
    screen = FakeScreen(48, 24)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((screen.width, screen.height)))
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(screen.width), "LINES": str(screen.height)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


def wrapped(text: str, width: int, seed: int = 0) -> str:
    wrapper = WordWrapper(lambda: width)
    return "".join(map(wrapper.push, pieces_of(text, seed))) + wrapper.flush()


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("the quick brown fox", 10, "the quick\nbrown fox"),
        ("exactly ten fits", 11, "exactly ten\nfits"),
        ("  kept at the start", 8, "  kept\nat the\nstart"),
        ("longerthanthescreen word", 8, "longerth\nanthescr\neen word"),
        ("one\n\n\ntwo", 8, "one\n\n\ntwo"),
        ("専門家を選びます。次に計算。", 10, "専門家を選\nびます。次\nに計算。"),
        ("五文字の、文", 8, "五文字\nの、文"),
        pytest.param("a 👩‍👩‍👧👩‍👩‍👧👩‍👩‍👧 b", 4, "a\n👩‍👩‍👧👩‍👩‍👧\n👩‍👩‍👧 b", marks=JOINED_EMOJI),
        (
            "say:\n```\nx = a_very_long(line)\n```\nand on it goes",
            8,
            "say:\n```\nx = a_very_long(line)\n```\nand on\nit goes",
        ),
        ("~~~\na long line ``` of code\n~~~~\nand words", 6, "~~~\na long line ``` of code\n~~~~\nand\nwords"),
        ("```inline``` code wraps too", 12, "```inline```\ncode wraps\ntoo"),
    ],
)
def test_words_are_wrapped_whole(text: str, width: int, expected: str) -> None:
    assert {wrapped(text, width, seed) for seed in range(5)} == {expected}


@pytest.mark.parametrize("width", [1, 7, 20, 200])
def test_no_row_is_too_wide_and_no_word_is_lost(width: int) -> None:
    text = re.sub(r"```.*```", "", ANSWER, flags=re.DOTALL)
    rows = wrapped(text, width).split("\n")
    assert all(cell_len(row) <= max(width, 2) for row in rows)
    assert "".join("".join(rows).split()) == "".join(text.split())


def stream(screen: FakeScreen, make: Callable[[], MarkdownScreen | WrappedScreen], text: str, seed: int = 0) -> None:
    with redirect_stdout(screen):
        writer = make()
        for piece in pieces_of(text, seed):
            writer.write(piece)
        writer.end()


def test_markdown_is_rendered(screen: FakeScreen) -> None:
    stream(screen, MarkdownScreen, ANSWER)
    assert (
        screen.text
        == """\
Experts and routers

A router chooses top_k experts. See the paper
(https://example.org/moe), List<String> and
<b>tags</b>.
A second line, [red]not markup[/red] and
snake_case_name, 2 ** 3 * 4.

 • one
 • two is longer and has so many words that it
   does not fit in one row of the screen
    • inner

 1. first

 2. second

```python
def double(value: int) -> int:
    note = "a string that is wider than the whol
e screen of this test"

    return value * 2
```

▌ quoted

日本語の文章は空白がないので、どこでも改行できま
す。ただし句読点は行頭に来ません。

[1]: https://example.org/reference !chart
(chart.png)
The last line 🙂 👍🏽"""
    )


def test_a_table_is_laid_out(screen: FakeScreen) -> None:
    stream(screen, MarkdownScreen, "| name | size |\n|---|--:|\n| **nf4** | 4.13 |\n\nAfter it.")
    rows = [row.split() for row in screen.text.splitlines()]
    assert [row for row in rows if row and set(row[0]) - set("─━")] == [
        ["name", "size"],
        ["nf4", "4.13"],
        ["After", "it."],
    ]


def test_the_pieces_do_not_matter(screen: FakeScreen) -> None:
    shown = set()
    for seed in range(8):
        screen.rows, screen.row, screen.column = [""], 0, 0
        stream(screen, MarkdownScreen, ANSWER, seed)
        shown.add(screen.text)
    assert len(shown) == 1


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("resize_at", range(10, 100, 10))
def test_nothing_is_lost_where_the_terminal_is_resized(screen: FakeScreen, resize_at: int) -> None:
    with redirect_stdout(screen):
        writer = MarkdownScreen()
        for number, piece in enumerate(pieces_of(ANSWER, 1)):
            if number == resize_at:
                # A terminal that does not move what is shown.
                screen.width, screen.height = 80, 12
            writer.write(piece)
        writer.end()
    assert "".join(words_of(screen.text)).startswith("Expertsandrouters")
    for word in words_of(ANSWER):
        assert word in screen.text.replace("\n", "")


def test_a_block_taller_than_the_screen_stays_as_it_was_streamed(screen: FakeScreen) -> None:
    verses = "\n".join(f"verse **{number}**" for number in range(40))
    stream(screen, MarkdownScreen, f"{verses}\n\nAnd **then**\n\nan end.\n")
    assert screen.text == f"{verses}\n\nAnd then\n\nan end."


def test_a_model_cannot_drive_the_terminal(screen: FakeScreen) -> None:
    evil = (
        "\x1b]0;title\x07 \x1b[2J *a* \x9b31m &#27;[31m [a](http://x/\x1b]8;;)\n\n```\n\x1b[5mcode\r\x08\n```\n- \x1bc"
    )
    for make in (MarkdownScreen, WrappedScreen):
        stream(screen, make, evil)
    assert "]0;title" in screen.text
    assert "[5mcode" in screen.text


@pytest.mark.parametrize(
    ("variables", "is_plain", "kind"),
    [
        ({}, False, MarkdownScreen),
        ({}, True, WrappedScreen),
        ({"NO_COLOR": "1"}, False, WrappedScreen),
        ({"TERM": "dumb"}, False, WrappedScreen),
    ],
)
@pytest.mark.usefixtures("screen")
def test_when_markdown_is_rendered(
    variables: dict[str, str], is_plain: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert type(answer_screen(is_plain=is_plain)) is kind


@pytest.mark.parametrize(
    "text", ["", "\n", "\n\nafter empty lines", "```\nnever closed", "- ", "| a |", "***", "a\n---"]
)
def test_the_end_may_come_anywhere(screen: FakeScreen, text: str) -> None:
    stream(screen, MarkdownScreen, text)
    assert screen.column == 0
    for word in words_of(text):
        assert word in screen.text
