"""Every script in `benchmarks/` with arguments that make it tiny, and the files that these name."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.profile.trace import save_trace
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.cli import ROOT, environment

BENCHMARKS = ROOT / "benchmarks"
SHAPE = {
    "vocab_size": 20480,  # prompts have ids of up to 20,299
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
}
MIXTURE = {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}


@dataclass(frozen=True, slots=True)
class Files:
    """A tiny OLMoE as checkpoint, config and store, a trace of it, and a dense Llama beside a Qwen2-MoE."""

    root: Path

    def make(self) -> None:
        _save(chat_model("olmoe", **SHAPE), self.checkpoint)
        self.config.write_text((self.checkpoint / "config.json").read_text())
        quantize(self.checkpoint, self.store)
        _save(chat_model("llama"), self.dense)
        _save(chat_model("qwen2_moe", **MIXTURE), self.mixture)
        with load(self.store, prefetch=0) as model, model.trace() as recorder:
            for _ in range(2):
                model.generate("To be", raw=True, temperature=0, max_new_tokens=8)
        save_trace(recorder.trace(), self.trace)

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def config(self) -> Path:
        return self.root / "tiny.json"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def dense(self) -> Path:
        return self.root / "dense"

    @property
    def mixture(self) -> Path:
        return self.root / "mixture"

    @property
    def trace(self) -> Path:
        return self.root / "trace.npz"


def _save(model: PreTrainedModel, folder: Path) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(0.5)  # logits as small as real ones: routers are recognized, and layers done in runs
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def run_script(name: str, arguments: str, files: Files, folder: Path) -> "subprocess.CompletedProcess[str]":
    """As a user runs it; `{store}` and the like are paths of `Files`, `{folder}` is empty."""
    paths = {field: getattr(files, field) for field in ("checkpoint", "config", "store", "dense", "mixture", "trace")}
    words = [word.format(**paths, root=files.root, folder=folder) for word in arguments.split()]
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(files.root / "cache", HF_HUB_OFFLINE="1"),
        timeout=600,
        check=False,
    )


def last_line(stdout: str) -> dict[str, object]:
    """The JSON document there. Raises: ValueError where it is none, or holds a number that is not finite."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no figure")

    document: dict[str, object] = json.loads(stdout.splitlines()[-1], parse_constant=refuse)
    return document


def figures_at(document: object, path: str) -> list[float]:
    """The numbers where `a.b` leads; a `*` stands for every key or every item."""
    found = [document]
    for name in path.split("."):
        found = [child for parent in found for child in _children(parent, name)]
    assert found, f"nothing at {path}"
    assert all(isinstance(value, int | float) for value in found), f"{path} is {found}"
    return [float(value) for value in found if isinstance(value, int | float)]


def _children(parent: object, name: str) -> list[object]:
    if name == "*":
        return list(parent.values()) if isinstance(parent, dict) else list(parent)  # type: ignore[call-overload]
    return [parent[name]] if isinstance(parent, dict) else [parent[int(name)]]  # type: ignore[index]
