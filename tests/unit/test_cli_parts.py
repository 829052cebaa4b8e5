"""Progress, status lines, message reading and chat commands, each by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from offload_moe.chat import TurnStats
from offload_moe.residency.counters import Counters
from tests.support.cli import load_cli

load_cli()

from offload_moe_cli import lines, progress, status, terminal  # noqa: E402


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def reader(*typed: str) -> Callable[[str], str]:
    waiting: Iterator[str] = iter(typed)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["hello"], "hello"),
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (["open \\"], "open "),
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "", "code", '"""'], "code"),
        (['"""all on one"""'], "all on one"),
        (['"""never closed', "x"], "never closed\nx"),
    ],
)
def test_messages_may_span_lines(typed: list[str], message: str) -> None:
    assert lines.read_message(reader(*typed)) == message


def test_the_end_of_input_is_the_end() -> None:
    with pytest.raises(EOFError):
        lines.read_message(reader())


def test_rate_and_time_left() -> None:
    clock = Clock()
    meter = progress.Meter(2**30, clock)
    clock.now = 2.0
    assert meter.text(2 * 2**30, 4 * 2**30) == "50%, 2.0 GiB of 4.0 GiB, 512 MiB/s, 4 s left"
    assert progress.Meter(0.0, clock).text(0.5, None) == "50%"
    assert meter.text(-1, None) == ""


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    report = progress.LineReporter(clock)
    with report:
        for second in range(26):
            clock.now = float(second)
            report("Downloading", second * 2**20, 100 * 2**20)
        report("Checking")
    assert capsys.readouterr().err.splitlines() == [
        "Downloading ...",
        "Downloading: 10%, 10 MiB of 100 MiB, 1 MiB/s, 1 min 30 s left",
        "Downloading: 20%, 20 MiB of 100 MiB, 1 MiB/s, 1 min 20 s left",
        "Checking ...",
    ]


def test_the_bar_takes_every_kind_of_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with progress.BarReporter() as report:
        report("Loading libraries")
        report("Copying", 0.25)
        report("Copying", -1)
        report("Writing", 5.0, 10.0)
        report("Writing", 10.0, 10.0)


@pytest.mark.parametrize(("seconds", "text"), [(5.7, "5 s"), (65, "1 min 05 s"), (3725, "1 h 02 min")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.format_duration(seconds) == text


def turn(**changes: Any) -> TurnStats:
    values: dict[str, Any] = {
        "num_prompt_tokens": 120,
        "num_reused_tokens": 100,
        "reuse": "cropped",
        "prompt_s": 0.5,
        "num_decode_tokens": 11,
        "decode_s": 2.0,
        "finish": "stop",
        "counters": Counters(num_hits=3, num_misses=1, stall_s=0.25),
        "memory_bytes": {"experts": 2**30, "dense": 2**29},
    }
    return TurnStats(**(values | changes))


def test_the_status_line() -> None:
    assert status.status_line(turn(), 200) == (
        "prompt 20 tok 40.0/s (+100 cached) · first token 0.5 s · answer 11 tok 5.0/s"
        " · hits 75.0% · stall 0.2 s · 1.5 GiB"
    )
    assert all(len(line) <= 40 for line in status.status_line(turn(), 40).splitlines())
    bare = turn(counters=None, memory_bytes={}, num_reused_tokens=0, reuse="recomputed", decode_s=0.0, finish="length")
    assert status.status_line(bare, 200) == (
        "prompt 120 tok 240.0/s · first token 0.5 s · answer 11 tok · the conversation was recomputed"
        " · stopped at 11 tokens, see /set max_new_tokens"
    )
    crossing = status.status_line(turn(reuse="recomputed", crossed_window=4096), 300)
    assert crossing.endswith(
        "the context passed 4,096 tokens: this model rotates keys differently beyond that, so the conversation was "
        "computed anew"
    )
    crowded = status.status_line(turn(num_slots_given_up=1200, num_slots_lost=70, finish="memory"), 300)
    assert (
        "1,200 expert slots were freed for the context · 70 expert slots made room for other programs"
        " · no memory for a longer context" in crowded
    )


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert terminal.safe("a\x1b[2Jb\tc\nd\r\x07\x9b") == "a[2Jb\tc\nd"


def test_full_statistics_of_a_turn() -> None:
    rows = dict(status.full_statistics(turn(), {"experts": 2**30}))
    assert rows["prompt"] == "120 tokens, 100 from the cache (cropped)"
    assert rows["expert hits"] == "3 of 4 (75.0%)"
    assert rows["memory: experts"] == "1.0 GiB"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "demo", "--speculate", "draft", "small", "Hello"], ("draft", "small", "Hello")),
        (["run", "--speculate", "draft", "small", "demo", "Hello"], ("draft", "small", "Hello")),
        (["run", "--speculate=draft", "small", "demo", "Hello"], ("draft", "small", "Hello")),
        (["run", "demo", "--speculate=draft", "--draft=small", "Hello"], ("draft", "small", "Hello")),
        (["run", "demo", "--speculate", "draft", "--draft", "small", "Hello"], ("draft", "small", "Hello")),
        (["run", "demo", "Hello", "--speculate", "ngram"], ("ngram", None, "Hello")),
        (["run", "demo", "Hello"], (None, None, "Hello")),
    ],
)
def test_a_draft_may_follow_its_choice(words: list[str], expected: tuple[str | None, ...]) -> None:
    options = load_cli().build_parser().parse_args(words)
    assert (options.speculate, options.draft, options.prompt) == expected
    assert options.model == "demo"
