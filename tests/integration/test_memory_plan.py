"""Planned against actual peak memory on the CPU, each budget in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_moe.convert.quantize import quantize
from offload_moe.plan import Machine, make_plan
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.cli import ROOT, environment

CONTEXT = 1024
SIZES = {
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": CONTEXT,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and a cache that weigh a fifth of what the process holds: 100 MiB and 32 MiB."""
    folder = tmp_path_factory.mktemp("memory")
    chat_model("qwen3_moe", **SIZES).to(torch.bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    quantize(folder / "model", folder / "store")
    return folder


@pytest.mark.parametrize("share", [pytest.param(1.0, marks=pytest.mark.slow), 0.25])
def test_the_peak_is_what_was_planned_within_5_percent(folder: Path, share: float, tmp_path: Path) -> None:
    """Planned from the config alone; a conversation that fills the context, with slots for a share of the experts."""
    plan = make_plan(folder / "model", Machine(ram_bytes=64 << 30), context=CONTEXT)
    num_slots = int(share * plan.shape.num_experts)
    planned_bytes = plan.placement.ram.bytes_with(num_slots)
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_plan.py"), str(folder / "store")]
    command += ["--budgets", f"{planned_bytes}B", "--contexts", str(CONTEXT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert (found["num_slots"], found["num_slots_given_up"], found["num_tokens"]) == (num_slots, 0, CONTEXT)
    assert found["planned_bytes"] == planned_bytes
    assert found["ratio"] == pytest.approx(1, abs=0.05), done.stderr
