"""Progress, status lines, message reading and chat commands, each by itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offload_moe.chat import Piece, TurnStats
from offload_moe.errors import ConfigError
from offload_moe.schedule.counters import Counters
from tests.support.cli import load_cli

load_cli()

from offload_moe_cli import lines, progress, slash, status, terminal  # noqa: E402
from offload_moe_cli.repl import Repl  # noqa: E402


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


def test_history_survives_and_is_private(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    readline.clear_history()
    history = lines.History(tmp_path / "deep" / "history")
    history.open()
    readline.add_history("what is an expert")
    history.close()
    assert (tmp_path / "deep" / "history").stat().st_mode & 0o777 == 0o600
    readline.clear_history()
    history.open()
    assert readline.get_history_item(1) == "what is an expert"
    readline.clear_history()
    lines.History(Path("/proc/nowhere/history")).close()


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
    crowded = status.status_line(turn(num_slots_given_up=1200, finish="memory"), 300)
    assert "1,200 expert slots gave way to the context · no memory for a longer context" in crowded


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert terminal.safe("a\x1b[2Jb\tc\nd\r\x07\x9b") == "a[2Jb\tc\nd"


class FakeSession:
    """The surface of a chat session that the loop uses."""

    def __init__(self) -> None:
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.last_stats: TurnStats | None = None
        self.withdrawn: str | None = None
        self.calls: list[tuple[Any, ...]] = []

    def send(self, text: str, **sampling: Any) -> Iterator[Piece]:
        self.calls.append(("send", text, sampling))
        yield Piece("answer", f"you said {text}")

    def retry(self, **sampling: Any) -> Iterator[Piece]:
        self.calls.append(("retry", sampling))
        yield Piece("answer", "again")

    def reset(self) -> None:
        self.calls.append(("reset",))

    def save(self, path: Path) -> None:
        self.calls.append(("save", path))

    def load(self, path: Path) -> None:
        self.calls.append(("load", path))


@pytest.fixture
def repl() -> Repl:
    return Repl(SimpleNamespace(peaks={"RAM": (2**31, 2**30)}, memory={"experts": 2**30}), FakeSession(), {"seed": 1})


def test_chat_commands(repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    session: Any = repl.session
    for line in (
        "/reset",
        "/retry",
        "/save a b.json",
        "/load ~/x.json",
        "/system Be kind.",
        "/set top_k 3",
        "/set seed default",
    ):
        slash.dispatch(repl, line)
    assert session.calls == [
        ("reset",),
        ("retry", {"seed": 1}),
        ("save", Path("a b.json")),
        ("load", Path("~/x.json").expanduser()),
    ]
    assert session.system == "Be kind."
    assert repl.sampling == {"top_k": 3}
    slash.dispatch(repl, "/system -")
    assert session.system is None
    for line in ("/help", "/stats", "/set", "/system"):
        slash.dispatch(repl, line)
    out, err = capsys.readouterr()
    assert out == "again\n"
    assert all(name in err for name in slash.COMMANDS)
    assert "memory: experts" in err
    assert "RAM at its peak  1.0 GiB, planned 2.0 GiB with the context full" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/frob", "no command /frob"),
        ("/save", "needs a file name"),
        ("/set warmth 1", "no setting warmth"),
        ("/set top_k lots", "'lots'"),
        ("/set top_p 3", "top_p is 3.0"),
    ],
)
def test_commands_that_cannot_be_done_say_why(repl: Repl, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slash.dispatch(repl, line)
    assert repl.sampling == {"seed": 1}


def test_leaving(repl: Repl) -> None:
    with pytest.raises(slash.LeaveError):
        slash.dispatch(repl, "/exit")


def test_full_statistics_of_a_turn() -> None:
    rows = dict(status.full_statistics(turn(), {"experts": 2**30}))
    assert rows["prompt"] == "120 tokens, 100 from the cache (cropped)"
    assert rows["expert hits"] == "3 of 4 (75.0%)"
    assert rows["memory: experts"] == "1.0 GiB"
