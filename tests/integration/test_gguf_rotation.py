"""Rotations and routing that a GGUF file describes by its own keys: logits of transformers on the decoded weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload_moe import load
from offload_moe.decode.rotation import rotation_keeper
from offload_moe.errors import CheckpointError
from tests.support.gguf_models import GgufModel, write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
IDS = torch.tensor([[(7 * n * n + 11 * n) % 256 for n in range(48)]])  # long enough for slow frequencies to count
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))


def furthest(written: GgufModel) -> float:
    """Relative, of the worst token."""
    with load(written.path, exact=True) as model, torch.no_grad():
        found, expected = model.hf(IDS).logits, written.hf(IDS).logits
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def factors_of_llama_3(head_dim: int) -> np.ndarray:
    """As the converter computes them, which divide frequencies. Source: conversion/llama.py, generate_extra_tensors."""
    factors = []
    for at in range(0, head_dim, 2):
        wave = 2 * math.pi * 10000 ** (at / head_dim)
        smooth = (64 / wave - 1) / (4 - 1)
        factors.append(1 / ((1 - smooth) / 8 + smooth) if 0 <= smooth <= 1 else 8 if smooth < 0 else 1)
    return np.array(factors, dtype=np.float32)


def test_frequencies_of_llama_3_are_divided_by_the_factors_in_the_file(tmp_path: Path) -> None:
    more = {"rope_freqs.weight": factors_of_llama_3(64)}
    written = write_model(tmp_path, "mixtral", rope_parameters=LLAMA_3, more=more)
    assert furthest(written) < 1e-5
    with load(written.path) as model:
        assert rotation_keeper(model.hf) is None  # by the position alone, as the fast path needs it


@pytest.mark.parametrize(
    ("factors", "metadata", "match"),
    [
        (np.zeros(32), {}, r"tensor rope_freqs\.weight is damaged: \[0\.0"),
        (np.ones(31) + 1, {}, r"rope_freqs\.weight has 31 factors, where 32 frequencies are"),
        (np.ones(32) + 1, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "not used together"),
    ],
)
def test_factors_that_are_not_usable(factors: np.ndarray, metadata: dict[str, Any], match: str, tmp_path: Path) -> None:
    more = {"rope_freqs.weight": factors.astype(np.float32)}
    keys = {f"llama.{key}": value for key, value in metadata.items()}
    path = write_model(tmp_path, "mixtral", metadata=keys, more=more).path
    with pytest.raises(CheckpointError, match=match):
        load(path)


def test_yarn(tmp_path: Path) -> None:
    """test_gguf_rope.py has every key of it."""
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 8.0, "attn_factor": 1.5}
    metadata = {f"qwen3moe.rope.scaling.{key}": value for key, value in scaling.items()}
    rope = YARN | {"beta_fast": 8.0, "attention_factor": 1.5 * (0.1 * math.log(4) + 1)}
    assert furthest(write_model(tmp_path, "qwen3_moe", metadata=metadata, rope_parameters=rope)) < 1e-5


def test_deepseek_with_yarn(tmp_path: Path) -> None:
    rope = YARN | {"mscale": 0.5, "mscale_all_dim": 0.5, "beta_fast": 8.0}
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 8.0}
    scaling = keys | {"yarn_log_multiplier": 0.05}
    metadata = {f"deepseek2.rope.scaling.{key}": value for key, value in scaling.items()}
    assert furthest(write_model(tmp_path, "deepseek_v3", metadata=metadata, rope_parameters=rope)) < 1e-5


@pytest.mark.parametrize(
    ("family", "settings", "has_keys"),
    [
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, False),  # Kimi K2, Moonlight; files from before the keys
        ("deepseek_v3", {"n_group": 8, "topk_group": 4, "n_routed_experts": 256}, False),  # DeepSeek-V3
        ("deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, True),
    ],
)
def test_groups_of_experts(family: str, settings: dict[str, Any], has_keys: bool, tmp_path: Path) -> None:
    keys = {"deepseek2.expert_group_count": None, "deepseek2.expert_group_used_count": None}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    few = {"n_routed_experts": 16, "num_experts_per_tok": 4} | sizes
    written = write_model(tmp_path, family, "Q8_0", {}, metadata={} if has_keys else keys, **(few | settings))
    assert furthest(written) < 1e-5


def test_tokens_rotate_far(tmp_path: Path) -> None:
    """The tests above would see another rotation: of the default one, the logits are far off."""
    written = write_model(tmp_path, "mixtral", rope_parameters=LLAMA_3)
    assert furthest(written) > 0.01
