"""`offload-moe profile --replay`, and what the command refuses."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from offload_moe.profile.replay import replay
from offload_moe.profile.trace import load_trace, save_trace
from offload_moe.residency.policy import POLICY_NAMES
from tests.support.cli import load_cli
from tests.support.profile import full_trace, routing_only

REAL = Path(__file__).parent.parent / "data" / "gpt-oss-20b-decode-head.npz"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    save_trace(routing_only(repeats=5), tmp_path / "t.npz")
    return str(tmp_path / "t.npz")


def profile(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status: int = load_cli().main(["profile", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def profile_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    status, out, _ = profile(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out)


class TestReplay:
    def test_every_policy_has_a_hit_rate(self, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = profile_json(capsys, "--replay", trace)
        assert [result["policy"] for result in found["results"]] == [*POLICY_NAMES, "belady"]
        for result in found["results"]:
            expected = replay(routing_only(repeats=5), result["policy"], num_slots=2)
            assert (result["hit_rate"], result["num_slots"], result["pool"]) == (expected.hit_rate, 2, "global")

    def test_policy_slots_and_pool(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--replay", str(REAL), "--policy", "lru", "--slots", "12.5%", "--pool", "layer")
        (result,) = profile_json(capsys, *arguments)["results"]
        expected = replay(load_trace(REAL), "lru", num_slots=96, pool="layer")
        assert (result["num_slots"], result["pool"], result["hit_rate"]) == (96, "layer", expected.hit_rate)

    def test_all_by_name(self, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = profile_json(capsys, "--replay", trace, "--policy", "all", "--slots", "3")
        assert {result["num_slots"] for result in found["results"]} == {3}
        assert len(found["results"]) == len(POLICY_NAMES) + 1

    def test_the_table(self, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, err = profile(capsys, "--replay", trace, "--policy", "lru", "--slots", "6", "--pool", "layer")
        expected = replay(routing_only(repeats=5), "lru", num_slots=6, pool="layer")
        assert status == 0
        assert "20 tokens, 2 layers, top-2 of 4 experts; 6 slots (75.0%), slots divided evenly" in out
        assert f"{100 * expected.hit_rate:.2f}%" in out
        assert "Replaying" in err
        assert "Replaying" not in out

    def test_a_page_of_the_trace(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_trace(full_trace(), tmp_path / "t.npz")
        arguments = ("--replay", str(tmp_path / "t.npz"), "--policy", "lru", "--html", str(tmp_path / "r.html"))
        assert profile(capsys, *arguments)[0] == 0
        assert len(ElementTree.fromstring((tmp_path / "r.html").read_text()).findall(".//svg")) == 9


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give either a MODEL to run or a trace to --replay"),
            (["demo", "--replay", "t.npz"], "give either a MODEL to run or a trace to --replay"),
            (["demo", "--slots", "4"], "--slots goes with --replay"),
            (["demo", "--pool", "layer"], "--pool goes with --replay"),
            (["--replay", "t.npz", "--prompts", "p"], "--prompts goes with a MODEL"),
            (["--replay", "t.npz", "--max-new-tokens", "3"], "--max-new-tokens goes with a MODEL"),
            (["demo", "--max-new-tokens", "0"], "0 is not at least 1"),
            (["--replay", "t.npz", "--pool", "both"], "invalid choice"),
        ],
    )
    def test_usage(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            load_cli().main(["profile", *arguments])
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--replay", "absent.npz"], "absent.npz does not exist"),
            (["--replay", str(REAL), "--policy", "magic"], "There is no policy 'magic'."),
            (["--replay", str(REAL), "--slots", "many"], "neither a number nor a percentage"),
            (["--replay", str(REAL), "--html", "no/such/folder/r.html"], "its folder does not exist"),
            (["demo", "--trace", "no/such/folder/t.npz"], "its folder does not exist"),
            (["demo", "--prompts", "no/such/file"], "no/such/file cannot be read"),
        ],
    )
    def test_one_line_and_exit_code_1(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = profile(capsys, *arguments)
        assert (status, out) == (1, "")
        assert message in err
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


class TestTables:
    def test_columns_go_below_each_other_where_they_do_not_fit(self) -> None:
        load_cli()
        from offload_moe_cli.tables import column_groups

        assert column_groups([10, 10, 10, 10], 40) == [[0, 1, 2, 3]]
        assert column_groups([10, 10, 10, 10], 39) == [[0, 1, 2], [0, 3]]
        assert column_groups([10, 10, 10, 10], 25) == [[0, 1], [0, 2], [0, 3]]
        assert column_groups([10, 50, 10], 30) == [[0, 1], [0, 2]]
