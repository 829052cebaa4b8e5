"""Every script in `benchmarks/` runs on a tiny model, so that none is stale when needed: `scripts/test_benchmarks`.

What they print here are no measurements.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_moe.engine.build import Blueprint, Engine, build
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.store import Store
from tests.support.benchmarks import BENCHMARKS, Files, figures_at, last_line, run_script

DECODE = "--threads 1 --tokens 4 --prompt-tokens 4"
RUN = ("runs.*.decode_tokens_per_s", "runs.*.prompt_tokens_per_s", "peak_rss_bytes")
# Script, arguments, and the figures that are not zero.
CASES: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "attention.py",
        "--trials 1 --threads 1 --heads 4x2x32 --latents 4x32x16 --contexts 600 --megabytes 1 --unpinned",
        ("results.*.us.median", "results.*.gb_per_s.median", "results.*.of_read.median"),
    ),
    (
        "prompt_attention.py",
        "--trials 1 --heads 4x2x32 --latents 4x32x16 --prompts 70 --chunk 40 --sets portable --unpinned",
        ("results.*.portable.ms.median", "results.*.torch.ms.median", "results.*.portable.times_torch.median"),
    ),
    (
        "linear_attention.py",
        "--threads 1 --layers 1 --tokens 2",
        ("module.step_ms.median", "module.outside_ms.median", "native.outside_ms.median", "bound_ms"),
    ),
    (
        "card_table.py",
        "--cards rtx-3060 --configs {config} --contexts 64",
        ("inputs.node_s", "cells.0.forecasts.*.tokens_per_s", "cells.0.device_pass_off_tokens_per_s"),
    ),
    ("card_table.py", "--replay {trace} --tokens 8", ("curves.*.queued.0.1", "curves.*.stepwise.0.1")),
    (
        "batching.py",
        "{mixture} --threads 1 --trials 1 --conversations 4 --tokens 16 --prompt-tokens 8 --clients 3 "
        "--client-prompt-tokens 20",
        (
            "four_conversations_ratio.median",
            "four_conversations_share_of_bound.min",
            "four_conversations_disk_ratio.max",
            "resident.rows_per_pass",
            "resident.byte_bound",
            "clients.p95_ms.*.median",
            "clients.p95_over_goal.median",
        ),
    ),
    (
        "codec_error.py",
        "{checkpoint} --experts-per-layer 1",
        ("errors.nf4 down_proj.median", "errors.int8 down_proj.max"),
    ),
    (
        "codec_quality.py",
        "{checkpoint} --tokens 64 --length 32",
        ("tokens", "rows.*.perplexity", "rows.*.top1_agreement", "rows.*.dense_bytes"),
    ),
    (
        "quality.py",
        "{checkpoint} --linears --tokens 128 --length 32 --formats nf4,nf4-calibrated,Q8_0",
        ("rows.*.perplexity_ratio", "rows.*.top1_agreement", "rows.*.bits_per_weight"),
    ),
    (
        "decode_cpu.py",
        "--config {config} --folder {folder} --trials 1 --layers 2 --transformers --context 8 " + DECODE,
        (
            "results.*.decode_tokens_per_s.*.median",
            "results.0.prompt_tokens_per_s.*.median",
            "results.0.decode_ratios.vs transformers bf16.median",
            "results.*.decode_cpu_ms.offload_moe.median",
            "results.*.share_of_byte_bound.offload_moe.median",
            "bytes_per_token.offload_moe.*",
            "outside_of_native_calls.*",
            "trials",
            "offload_moe.first_token_s",
            "offload_moe.distinct_experts_per_layer",
        ),
    ),
    (
        "decode_cpu.py",
        "--config {config} --folder {folder} --trials 1 --codec mxfp4 --reload --context 8 " + DECODE,
        ("results.*.decode_tokens_per_s.offload_moe.min", "bytes_per_token.offload_moe.bits_per_expert_weight"),
    ),
    (
        "decode_cpu.py",
        "--config {config} --folder {folder} --trials 1 --same-file Q4_K_M " + DECODE,
        ("results.*.decode_tokens_per_s.offload_moe.min", "bytes_per_token.offload_moe.bits_per_expert_weight"),
    ),
    (
        "decode_demo.py",
        "--checkpoint {checkpoint} --threads 1 --tokens 4 --trials 1 --unpinned",
        ("rates.*.median", "ratios.ours nf4.median"),
    ),
    (
        "decode_demo.py",
        "--checkpoint {checkpoint} --threads 1 --tokens 4 --trials 1 --unpinned --resident 0.5",
        ("rates.*.median", "ratios.*.median"),
    ),
    (
        "demo_quality.py",
        "--dense {dense} --mixture {mixture} --sequences 1",
        ("texts.*.ratio", "ratio_mean", "active_share", "expert_usage_max", "bf16_top_k_agreement"),
    ),
    (
        "disk_tier.py",
        "--config {config} --folder {folder} --trials 1 --peer-tokens 2 --accelerate 1 " + DECODE,
        ("decode_tokens_per_s.*.median", "prompt_tokens_per_s.*.median", "disk_bytes_per_s.median", "num_ram_slots"),
    ),
    (
        "guesses.py",
        "{store}",
        ("texts.*.tokens_per_pass", "texts.*.gain", "texts.edit.num_right", "texts.*.us_per_token"),
    ),
    (
        "hints.py",
        "{trace} --tokens 30 --resident 0.15",
        ("traces.*.*.none.misses", "traces.*.*.draft.recall", "traces.*.*.same token.reads", "traces.*.*.draft.alone"),
    ),
    (
        "kernel.py",
        "--trials 1 --threads 1 --shapes 128x1024 --tokens 1,2 --megabytes 1 --unpinned --peers",
        ("results.0.gb_per_s.median", "results.0.of_read.median", "results.0.error", "results.1.rows_gain.median"),
    ),
    (
        "kernel.py",
        "--trials 1 --threads 1 --shapes 256x512 --codecs Q4_K,Q6_K --megabytes 1 --unpinned",
        ("results.0.gb_per_s.median", "results.0.of_read.median", "results.0.error"),
    ),
    (
        "memory_budget.py",
        "--config {config} --folder {folder} --layers 2 --tokens 64 --prompts 8 --budgets 1500000000",
        ("results.*.peak_rss_bytes", "results.*.tokens_per_s", "peak_over_budget.8.0"),
    ),
    (
        "memory_plan.py",
        "{store} --contexts 64",
        ("results.*.ratio", "results.*.num_slots", "results.*.num_tokens"),
    ),
    (
        "overlap.py",
        "--rates 1 --tokens 2 --trials 1 --hidden 128 --intermediate 64",
        ("rates.*.off", "rates.*.on", "rates.*.prompt", "rates.*.recall", "compute_equals_transfer_gb_per_s"),
    ),
    (
        "plain_read.py",
        "--threads 1 --megabytes 1 --trials 1",
        ("bytes_per_s.median",),
    ),
    ("peers/make_random_checkpoint.py", "{config} {folder}/made", ("checkpoint_bytes",)),
    ("peers/make_random_gguf.py", "{config} {folder}/made.gguf", ("gguf_bytes",)),
    ("peers/run_accelerate.py", "{folder}/offloaded --config {config} --threads 1 --prompt-tokens 4 --tokens 2", RUN),
    ("peers/run_transformers.py", "{checkpoint} --bitsandbytes --runs 1 " + DECODE, RUN),
    (
        "policies.py",
        "{trace} --tokens 4 --slots 25%",
        ("hit_rate.lru", "hit_rate.belady", "rows.*.acquire_us"),
    ),
    ("policy_robustness.py", "{trace} --tokens 4", ("rows.*.lru_per_layer",)),
    (
        "quantize_speed.py",
        "{checkpoint} --folder {folder} --trials 1",
        ("seconds.*.median", "cpu_s.median", "store_bytes", "share_of_the_slower_limit.median"),
    ),
    (
        "real_sizes.py",
        "{folder}/scratch tiny --configs {root} --whole",
        ("models.tiny.quantize.peak_rss_bytes", "models.tiny.run.runs.*.decode_tokens_per_s"),
    ),
    (
        "recording_cost.py",
        "{store} --pairs 1 --tokens 12",
        ("num_tokens", "token_cpu_s.plain", "token_cpu_s.recorded", "extra"),
    ),
    (
        "router_scores.py",
        "{trace} --tokens 8",
        ("hit_rate.uses", "hit_rate.probabilities", "hit_rate.belady"),
    ),
    (
        "rows_per_pass.py",
        "{store} --threads 1 --rows 1,2 --tokens 4 --prompt-tokens 8 --trials 1",
        (
            "one_sequence.*.tokens_per_s.median",
            "several_sequences.*.cpu_ms_per_row.median",
            "several_sequences.2.experts_per_layer.median",
        ),
    ),
    (
        "run_disk.py",
        "{store} --runs 1 --lru-slots 40 " + DECODE,
        (*RUN, "lru_hit_rate", "num_ram_slots"),
    ),
    (
        "run_quantize.py",
        "{checkpoint} {folder}/made",
        ("wall_s", "cpu_s", "source_bytes_per_s", "num_experts", "disk_s.read_s", "disk_s.sum", "peak_rss_bytes"),
    ),
    (
        "run_store.py",
        "{store} --runs 1 " + DECODE,
        (*RUN, "first_token_s", "distinct_experts_per_layer"),
    ),
    (
        "scheduler.py",
        "--layers 2 --experts 8 --top-k 2 --trials 1",
        ("us_per_layer.*.median", "goal_us"),
    ),
    (
        "serve.py",
        "{store} --trials 1 --tokens 40 --prompt-tokens 20",
        ("ms_per_token.*.median", "ratio.median", "first_token_ms.median"),
    ),
    (
        "serve_peers.py",
        "--config {config} --folder {folder} --threads 1 --trials 1 --prompt-tokens 20 --new-tokens 4",
        ("first_token_ms.*.median", "without_prefix_ms.*"),
    ),
    (
        "simulate_validation.py",
        "--folder {folder} --models olmoe --config {config} --trials 1 --threads 1 --tokens 12",
        (
            "models.olmoe.budgets.*.simulated_decode_tokens_per_s",
            "models.olmoe.constants.costs.expert_s",
            "models.olmoe.budgets.*.measured_decode_tokens_per_s.median",
            "models.olmoe.num_validated",
        ),
    ),
    (
        "replay_rows.py",
        "{trace} --tokens 30 --rows 2",
        ("four_replayed_ratio.min", "replay_auto_worst_ratio", "traces.*.disk.guesses.2.always"),
    ),
    (
        "replicas.py",
        "--replicas 2 --users 2 --seeds 1",
        ("results.2 users.2.*.hit_rate", "results.2 users.2.*.first_token_s_p95", "results.2 users.2.*.answers"),
    ),
    (
        "speculation.py",
        "{store} --threads 1 --trials 1 --tokens 24 --context 512 --characters 120 --prompts 1 --rows 2,4",
        (
            "ngram_edit_ratio.median",
            "ngram_json_ratio.min",
            "ngram_edit_disk_ratio.max",
            "auto_prose_worst_ratio.median",
            "replay_share_of_bound.median",
            "replay_auto_worst_ratio.min",
            "replay.*.byte_bound",
        ),
    ),
    (
        "speculation.py",
        "{store} --threads 1 --trials 1 --tokens 16 --context 256 --rows 2 --replay-alone",
        ("replay_share_of_bound.median", "replay.2.tokens_per_pass"),
    ),
    ("first_token.py", "demo --trials 1", ("first_token_s.ours, cached.median", "first_token_s.ours, disk.min")),
    (
        "device_host_time.py",
        "--shapes Qwen3-30B-A3B --layers 1 --trials 1 --tokens 3",
        (
            "host_time.Qwen3-30B-A3B.queued.queued_ms.median",
            "host_time.Qwen3-30B-A3B.queued.step_loop_ms.median",
            "host_time.Qwen3-30B-A3B.stepwise.per_layer.step_loop_us",
        ),
    ),
    ("synthesize.py", "{config} {folder}/made --layers 1 --dense-codec int8", ("store_bytes",)),
    ("synthesize_checkpoint.py", "{config} {folder}/made --layers 1", ("checkpoint_bytes",)),
    (
        "step_overhead.py",
        "{store} --trials 1 --tokens 6",
        ("greedy.ratio.median", "sampled.ratio.median", "greedy.cpu_ms_per_token.step loop.median"),
    ),
    (
        "token_profile.py",
        "{store} --tokens 4",
        ("ms_per_token.om_span_pass", "share_outside_of_native_calls"),
    ),
    (
        "token_profile.py",
        "{store} --tokens 4 --plain",
        ("ms_per_token.experts", "share_outside_of_native_calls"),
    ),
    (
        "token_profile.py",
        "{store} --tokens 4 --layer-by-layer",
        ("ms_per_token.om_layer_step", "ms_per_token.layers", "share_outside_of_native_calls"),
    ),
]
BY_THEMSELVES = {
    "chat_start.py",
    "gpu_decode.py",
    "paired.py",
    "peers/run_llamacpp.py",
    "peers/serve_llamacpp.py",  # by serve_peers.py
    "peers/tune_llamacpp.py",  # with made-up runs
}


def test_every_script_is_run() -> None:
    scripts = {
        str(path.relative_to(BENCHMARKS)) for path in BENCHMARKS.rglob("*.py") if '"__main__"' in path.read_text()
    }
    assert scripts == {name for name, *_ in CASES} | BY_THEMSELVES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("files"))
    files.make()
    return files


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "figures"), CASES)
def test_a_script_ends_with_its_figures(
    name: str, arguments: str, figures: tuple[str, ...], files: Files, tmp_path: Path
) -> None:
    done = run_script(name, arguments, files, tmp_path)
    assert done.returncode == 0, done.stderr
    document = last_line(done.stdout)
    assert document["machine"].keys() >= {"cpu", "cores", "instruction_set", "commit", "torch"}
    for path in figures:
        assert all(figures_at(document, path)), f"{path}: a figure is zero"


@pytest.mark.slow
def test_llamacpp_runs_where_it_is_installed(files: Files, tmp_path: Path) -> None:
    if find_spec("xllamacpp") is None and find_spec("llama_cpp") is None:
        done = run_script("peers/run_llamacpp.py", "absent.gguf", files, tmp_path)
        assert done.returncode == 1
        assert done.stderr == "llama.cpp is not here, so it is left out: pip install xllamacpp\n"
        return
    made = run_script("peers/make_random_gguf.py", "{config} {folder}/made.gguf", files, tmp_path)
    assert made.returncode == 0, made.stderr
    done = run_script("peers/run_llamacpp.py", "{folder}/made.gguf --runs 1 " + DECODE, files, tmp_path)
    assert done.returncode == 0, done.stderr
    for path in RUN:
        assert all(figures_at(last_line(done.stdout), path))


LLAMACPP = """#!{python}
import json, sys
if "--describe" in sys.argv:
    print(json.dumps({{"missing_instructions": [], "version": "1"}}))
else:
    speed = 10 + 5 * ("--huge-pages" in sys.argv) + int(sys.argv[sys.argv.index("--runs") + 1])
    rates = (1000, speed, speed + 1, speed + 2)
    names = "decode_tokens_per_s", "prompt_tokens_per_s", "decode_cpu_ms", "prompt_cpu_ms"
    runs = [dict(zip(names, (rate, 2 * rate, 500 / rate, 50 / rate))) for rate in rates]
    print(json.dumps({{"runs": runs}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "decode", "prompt"), [("1", 40, 400), ("2", 20, 40)])
def test_settings_of_llamacpp_are_compared(
    threads: str, decode: float, prompt: float, files: Files, tmp_path: Path
) -> None:
    """Its runs are made up: the first does not count, and with one thread CPU time does."""
    stub = tmp_path / "python"
    stub.write_text(LLAMACPP.format(python=sys.executable))
    stub.chmod(0o755)
    arguments = f"m.gguf --native {stub} --threads {threads}"
    done = run_script("peers/tune_llamacpp.py", arguments, files, tmp_path)
    assert done.returncode == 0, done.stderr
    document = last_line(done.stdout)
    for setting, factor in (("--flash-attention on", 0.75), ("--flash-attention off --huge-pages", 1)):
        medians = document["tokens_per_s"][setting]  # type: ignore[index]
        assert medians["decode"]["median"] == pytest.approx(factor * decode)
        assert medians["prompt"]["median"] == pytest.approx(factor * prompt)
    assert document["best"] == dict.fromkeys(("decode", "prompt"), "--flash-attention off --huge-pages")


@pytest.mark.slow
def test_a_python_without_a_build_of_its_own_is_no_native_peer(files: Files, tmp_path: Path) -> None:
    if find_spec("llama_cpp") is not None:
        pytest.skip("llama-cpp-python is here")
    arguments = f"--config {{config}} --folder {{folder}} --native {sys.executable} {DECODE}"
    done = run_script("decode_cpu.py", arguments, files, tmp_path)
    assert done.returncode == 1
    assert not list(tmp_path.iterdir()), "files were made before it was noticed"


@pytest.mark.slow
def test_gpu_decode_says_that_there_is_no_card(files: Files, tmp_path: Path) -> None:
    done = run_script("gpu_decode.py", "{store} --tokens 2", files, tmp_path)
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stderr
        assert all(figures_at(last_line(done.stdout), "rows.*.tokens_per_s.median"))
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert "No GPU that torch can use is here" in done.stderr


@pytest.mark.slow
def test_gpu_decode_measures_a_simulated_device(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_decode = import_module("gpu_decode")
    monkeypatch.setattr(gpu_decode, "LINK_BYTES", 1 << 20)
    monkeypatch.setattr("offload_moe.memory.copier.AcceleratorCopier", lambda device: SimulatedCopier())
    monkeypatch.setattr("offload_moe.engine.load.build", _build_with_simulated_device)
    cpu = torch.device("cpu")
    link = gpu_decode.link_bytes_per_s(cpu)
    options = Namespace(model=files.store, ram=None, trials=1, tokens=6)
    for way in ("modules", "hybrid"):
        row = gpu_decode.measure(options, cpu, 0.25, way, link)
        assert not row["takes_device_pass"]
        assert row["num_slots"] == 12
        assert 0 < row["hit_rate"] < 1
        assert row["tokens_per_s"]["median"] > 0
        assert row["link_s_per_token"] > 0


def _build_with_simulated_device(store: Store, blueprint: Blueprint, skeleton: Any, mtp: Any) -> Engine:
    """A slot for every expert in RAM and on the device."""
    num_records = blueprint.pools.keys.total
    pools = replace(
        blueprint.pools,
        num_ram_slots=num_records,
        num_device_slots=num_records,
        chunk_bytes=blueprint.pools.slot_bytes,
    )
    copier = partial(SimulatedCopier, latency_s=0)
    return build(store, replace(blueprint, pools=pools, make_copier=copier), skeleton, mtp)
