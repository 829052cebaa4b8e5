"""`offload-moe simulate`: labelled, complete, and clear about what it cannot do."""

import json
from pathlib import Path

import pytest

from offload_moe.plan import Machine, make_plan
from offload_moe.plan.simulation import borrowed_room, simulate_plan
from offload_moe.plan.speed import takes_token_passes
from offload_moe.profile.trace import save_trace
from offload_moe.simulate import synthetic_trace
from tests.support.plan import GIB

CONFIGS = Path(__file__).parents[1] / "data/configs"
MIXTRAL = str(CONFIGS / "Mixtral-8x7B-v0.1.json")


def main(*arguments: str) -> int:
    from offload_moe_cli.main import main

    return main(["simulate", *arguments])


def test_json_says_that_it_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--prompt-tokens", "8", "--max-new-tokens", "8"]
    assert main(MIXTRAL, "--gpu", "rtx-4090", "--ram", "64GiB", "--pcie", "3x16", "--json", *short) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["basis"] == "simulated"
    assert document["decode_tokens_per_s"] > 0
    assert document["prompt_tokens_per_s"] > 0
    assert document["machine"]["rates"]["link"] == pytest.approx(12.6e9, rel=0.01)
    assert 0 < document["pools"]["num_device_slots"] < 256


def test_text_says_that_it_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--prompt-tokens", "4", "--max-new-tokens", "4"]
    assert main(str(CONFIGS / "granite-3.0-1b-a400m.json"), "--ram", "4GiB", *short) == 0
    out = capsys.readouterr().out
    assert "Every figure is simulated" in out
    assert "tokens/s" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MIXTRAL, "--gpu", "voodoo"], "There is no card 'voodoo'"),
        ([MIXTRAL, "--pcie", "4x16"], "--gpu"),
        ([MIXTRAL, "--ram", "1GiB"], "does not fit: RAM lacks"),
        ([MIXTRAL, "--reuse", "1.5"], "--reuse 1.5"),
        ([MIXTRAL, "--disk-gbps", "0"], "--disk-gbps '0'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*arguments) == 1
    assert message in capsys.readouterr().err


def test_a_trace_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(synthetic_trace(num_experts=[8] * 2, top_k=2, num_tokens=20), tmp_path / "t.npz")
    assert main(MIXTRAL, "--trace", str(tmp_path / "t.npz"), "--ram", "64GiB") == 1
    assert "2 MoE layers, 8 experts and top-2" in capsys.readouterr().err


def test_slots_borrow_the_room_of_a_context_that_is_not_there_yet() -> None:
    config = str(CONFIGS / "granite-3.0-1b-a400m.json")
    short, long = (make_plan(config, Machine(ram_bytes=GIB), context=context) for context in (128, 2048))
    rates = [simulate_plan(plan, prompt_tokens=8, num_tokens=8).result.hit_rate for plan in (short, long)]
    num_planned = [plan.placement.ram.num_slots for plan in (short, long)]
    assert num_planned[1] < 0.9 * num_planned[0]
    assert rates[1] > 0.98 * rates[0]


@pytest.mark.parametrize(
    ("name", "borrows", "passes"),
    [("Mixtral-8x7B-v0.1", True, True), ("DeepSeek-V2", True, False), ("gpt-oss-120b", False, False)],
)
def test_what_layers_keep_decides_over_borrowed_room_and_token_passes(name: str, borrows: bool, passes: bool) -> None:
    """Slots borrow room beside latents too, which are taken layer by layer; sliding windows neither way."""
    config = str(CONFIGS / f"{name}.json")
    plan = make_plan(config, Machine(ram_bytes=64 * GIB))
    assert (borrowed_room(plan) is not None, takes_token_passes(plan.shape, plan.machine)) == (borrows, passes)
    assert borrowed_room(make_plan(config, Machine(ram_bytes=64 * GIB, vram_bytes=12 * GIB))) is None


def test_the_plan_and_the_simulation_agree_where_nothing_is_missed() -> None:
    plan = make_plan(MIXTRAL, Machine(ram_bytes=64 * GIB), context=1024)
    assert plan.speed is not None
    result = simulate_plan(plan, prompt_tokens=64, num_tokens=12, reuse=1.0).result
    assert result.hit_rate == 1
    assert result.token_s == pytest.approx(plan.speed.forecasts[0].token_s, rel=1e-4)
