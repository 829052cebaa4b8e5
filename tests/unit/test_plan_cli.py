"""`offload-moe plan` as a user sees it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from offload_moe.demo import checkpoint_folder
from tests.support.cli import load_cli
from tests.support.plan import CONFIGS

MIXTRAL = str(CONFIGS / "Mixtral-8x7B-v0.1.json")
DEEPSEEK = str(CONFIGS / "DeepSeek-V3.json")
PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
COMPLETE = {
    "model": str,
    "architecture": str,
    "model_type": str,
    "total_parameters": int,
    "active_parameters": int,
    "fp16_bytes": int,
    "active_fp16_bytes": int,
    "num_layers": int,
    "num_moe_layers": int,
    "num_experts": int,
    "top_k": int,
    "max_context": int,
    "checkpoint_bytes": int,
    "checkpoint_is_exact": bool,
    "store_bytes": dict,
    "context": int,
    "codec": str,
    "dense_codec": str,
    "compute_dtype": str,
    "why_no_device_pass": str,
    "memory": dict,
    "fits": bool,
    "shortfalls": list,
    "speed": dict,
    "changes": list,
    "multi_token_prediction": type(None),
}
TIER = {"budget_bytes", "used_bytes", "missing_bytes", "parts", "num_slots", "slots_per_layer", "slot_bytes"}
SPEED = {"basis", "low_tokens_per_s", "high_tokens_per_s", "bottleneck", "rates", "forecasts"}


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status: int = load_cli().main(["plan", *arguments])
    return status, capsys.readouterr().out


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status, out = plan(capsys, *arguments, "--json")
    return status, json.loads(out)


def test_the_table_of_a_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan_json(capsys, MIXTRAL, "--vram", "12GiB", "--ram", "64GiB")
    num_slots = found["memory"]["vram"]["num_slots"]
    status, out = plan(capsys, MIXTRAL, "--vram", "12GiB", "--ram", "64GiB")
    assert status == 0
    for text in (
        "MixtralForCausalLM, 46.70B parameters, 12.88B active",
        "32 MoE layers, 256 experts, top-2",
        "In fp16 87.0 GiB, active 24.0 GiB",
        "Checkpoint about 87.0 GiB; store by codec of the experts: nf4 24.7 GiB",
        "key/value cache, 8,192 tokens",
        f"{num_slots} expert slots of 87 MiB, {num_slots / 32:.1f} per layer",
        "simulated: hit rates of replayed traces, assumed bandwidths",
        "graphs of the device pass, 2,356 nodes of 16 KiB",
        "Decode takes the device pass, stepwise; it has never run on a card. Assumed: 2.5 us per graph node, 1 ms for "
        "sampling, the CPU at 40 GB/s, 40 us more for a stepwise layer.",
        "What binds: computing missed experts on the CPU.",
        "What would help most: twice the VRAM",
    ):
        assert text in out
    assert "VRAM 12.0 GiB" in out
    assert "disk" in out


def test_without_the_device_pass_decode_goes_through_modules(capsys: pytest.CaptureFixture[str]) -> None:
    card = ["--gpu", "rtx-3060", "--ram", "64GiB"]
    status, out = plan(capsys, MIXTRAL, *card, "--device-pass", "off")
    assert status == 0
    assert "Decode goes through transformers' modules, without the device pass: it is off." in out
    assert "What binds: sending missed experts to the GPU." in out
    assert "device pass, " not in out
    assert "70% of the card's bandwidth, 2.5 us per graph node" in plan(capsys, MIXTRAL, *card)[1]
    off, on = (plan_json(capsys, MIXTRAL, *card, "--device-pass", choice)[1] for choice in ("off", "auto"))
    assert (off["why_no_device_pass"], on["why_no_device_pass"]) == ("it is off", "")
    assert {forecast["way"] for forecast in off["speed"]["forecasts"]} == {"modules"}
    assert {forecast["way"] for forecast in on["speed"]["forecasts"]} <= {"queued", "stepwise"}
    assert on["memory"]["vram"]["parts"]["graphs_of_the_device_pass"] == 2356 << 14
    assert "graphs_of_the_device_pass" not in off["memory"]["vram"]["parts"]


def test_the_parts_of_the_table_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan_json(capsys, MIXTRAL, "--vram", "12GiB", "--ram", "64GiB", "--context", "4096", "--codec", "int8")
    for tier in found["memory"].values():
        assert set(tier) == TIER
        assert tier["used_bytes"] == sum(tier["parts"].values()) + tier["num_slots"] * tier["slot_bytes"]
        assert tier["missing_bytes"] == 0
    assert found["memory"]["vram"]["parts"]["key_value_cache"] == 4096 * 32 * 2 * 8 * 128 * 2
    assert found["memory"]["disk"]["budget_bytes"] is None


def test_the_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = plan_json(capsys, MIXTRAL, "--vram", "12GiB", "--ram", "64GiB")
    assert status == 0
    assert {name: type(value) for name, value in found.items()} == COMPLETE
    assert found["total_parameters"] == 46_702_792_704
    assert found["active_parameters"] == 12_879_925_248
    assert found["fp16_bytes"] == 2 * found["total_parameters"]
    assert set(found["memory"]) == {"vram", "ram", "disk"}
    assert set(found["store_bytes"]) >= {"nf4", "int8", "bf16"}
    assert set(found["speed"]) == SPEED
    low, high = found["speed"]["forecasts"]
    assert found["speed"]["low_tokens_per_s"] == low["tokens_per_s"] <= high["tokens_per_s"]
    assert found["speed"]["basis"].startswith("simulated")


def test_what_does_not_fit_leaves_with_1_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = plan(capsys, DEEPSEEK, "--vram", "12GiB", "--ram", "64GiB")
    assert status == 1
    said = re.search(
        r"Does not fit: VRAM lacks 2\.\d GiB \((14\.\d) GiB needed, 12\.0 GiB there\)\. "
        r"It would fit with --vram 0 \(everything in RAM\) or --vram (14\.\d)GiB\.",
        out,
    )
    assert said is not None
    assert "tokens/s" not in out
    status, found = plan_json(capsys, DEEPSEEK, "--vram", "12GiB", "--ram", "64GiB")
    assert status == 1
    assert (found["fits"], found["speed"], found["changes"]) == (False, None, [])
    (shortfall,) = found["shortfalls"]
    assert shortfall["missing_bytes"] == shortfall["needed_bytes"] - (12 << 30)
    assert found["memory"]["vram"]["missing_bytes"] == shortfall["missing_bytes"]
    assert said[1] == f"{shortfall['needed_bytes'] / (1 << 30):.1f}"
    assert plan(capsys, DEEPSEEK, "--vram", f"{said[2]}GiB", "--ram", "64GiB")[0] == 0
    assert plan(capsys, DEEPSEEK, "--vram", f"{float(said[2]) - 0.1:.1f}GiB", "--ram", "64GiB")[0] == 1


def test_weights_that_cost_quality_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    line = "Warning: nf4 dense weights cost quality."
    for dense_codec, is_said in (("nf4", True), ("int8", False)):
        _, out = plan(capsys, MIXTRAL, "--vram", "0", "--ram", "64GiB", "--dense-codec", dense_codec)
        assert (line in out) == is_said


def test_without_a_device_there_is_no_vram(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan_json(capsys, MIXTRAL, "--vram", "0", "--ram", "64GiB", "--dense-codec", "nf4")
    assert found["memory"]["vram"] is None
    assert found["compute_dtype"] == "float32"
    assert found["memory"]["ram"]["num_slots"] == 256
    assert {forecast["hit_rate"] for forecast in found["speed"]["forecasts"]} == {1.0}


def test_names_in_the_cache_and_the_demo_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    assert load_cli().main(["plan", "demo"]) == 1
    assert "The demo model is not built yet." in capsys.readouterr().err
    folder = checkpoint_folder(tmp_path)
    folder.mkdir(parents=True)
    shutil.copy(CONFIGS / "granite-3.0-1b-a400m.json", folder / "config.json")
    for name in ("demo", folder.name):
        assert plan_json(capsys, name, "--vram", "0", "--ram", "8GiB")[1]["architecture"] == "GraniteMoeForCausalLM"


def test_this_machine_is_measured_without_flags(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan_json(capsys, str(CONFIGS / "granite-3.0-1b-a400m.json"))
    assert found["memory"]["ram"]["budget_bytes"] > 0
    assert found["memory"]["disk"]["budget_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-thing"], "is neither a file or folder, nor a hub id"),
        ([str(CONFIGS / "GRIN-MoE.json")], "model type 'grinmoe' is not in transformers"),
        ([MIXTRAL, "--context", "99999"], "takes at most 32,768 tokens, --context is 99,999"),
        ([MIXTRAL, "--vram", "much"], "Cannot read 'much' as a size"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert load_cli().main(["plan", *arguments]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert message in streams.err.splitlines()[-1]
    assert streams.err.splitlines()[-1].startswith("error: ")


def test_the_page_about_plan_shows_what_it_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `$ offload-moe plan` example of docs/plan.md; a line of dots stands for lines left out."""
    monkeypatch.chdir(CONFIGS)
    blocks = re.findall(r"^    \$ offload-moe plan (.*)\n((?:    .*\n|\n)+)", PAGE.read_text(), re.MULTILINE)
    assert len(blocks) == 2
    for arguments, shown in blocks:
        _, out = plan(capsys, *arguments.split())
        expected = [line.strip() for line in shown.splitlines() if line.strip() not in ("", "...")]
        printed = [line.strip() for line in out.splitlines() if line.strip()]
        assert printed[-len(expected) :] == expected


def test_the_page_about_plan_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan_json(capsys, MIXTRAL, "--vram", "12GiB", "--ram", "64GiB")
    page = PAGE.read_text()
    for name in (*found, *TIER, *SPEED):
        assert f"`{name}`" in page, name


def test_a_card_of_the_table_can_be_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan_json(capsys, MIXTRAL, "--gpu", "RTX 4090", "--ram", "8GiB")
    assert found["memory"]["vram"]["budget_bytes"] == int(0.9 * (24 << 30))
    assert found["speed"]["rates"]["vram"] == pytest.approx(0.7 * 1008e9)
    _, less = plan_json(capsys, MIXTRAL, "--gpu", "4090", "--vram", "12GiB", "--ram", "8GiB")
    assert less["memory"]["vram"]["budget_bytes"] == 12 << 30
    assert plan(capsys, MIXTRAL, "--gpu", "rtx3060", "--vram", "13GiB")[0] == 1


def test_memory_of_another_machine_is_said_and_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_moe.plan.budget.total_ram", lambda: 16 << 30)
    for ram, is_said in (("64GiB", True), ("16GiB", False)):
        assert load_cli().main(["plan", MIXTRAL, "--vram", "0", "--ram", ram]) == 0
        said = "Planned for another machine: 64.0 GiB of RAM, and this machine has 16.0 GiB." in capsys.readouterr().err
        assert said == is_said


def test_ranges_are_printed_ascending(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = plan(capsys, MIXTRAL, "--vram", "8GiB", "--ram", "8GiB")
    ranges = [(float(low), float(high)) for low, high in re.findall(r"([\d.]+)%? to ([\d.]+)", out.split("Decode")[1])]
    assert len(ranges) >= 2
    assert all(low < high for low, high in ranges[:3])
