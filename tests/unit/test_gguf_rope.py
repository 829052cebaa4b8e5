"""YaRN out of a GGUF file's keys: the frequencies and the scale that llama.cpp computes, as transformers has them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from offload_moe.checkpoint.gguf_metadata import Metadata
from offload_moe.checkpoint.gguf_rope import rope_of
from offload_moe.errors import CheckpointError

HEAD, THETA, CONTEXT = 64, 10000.0, 4096


def rope(**scaling: Any) -> dict[str, Any]:
    keys = {f"rope.scaling.{key}" if "." not in key else key: value for key, value in scaling.items()}
    values = {f"qwen3moe.{key}": value for key, value in ({"context_length": CONTEXT} | keys).items()}
    return rope_of(Metadata(Path("a.gguf"), values | {"general.architecture": "qwen3moe"}, {}))


def of_transformers(parameters: dict[str, Any]) -> tuple[np.ndarray, float]:
    config = AutoConfig.for_model(
        "qwen3_moe", head_dim=HEAD, max_position_embeddings=CONTEXT, rope_parameters=parameters
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    return frequencies.numpy(), float(scale)


def of_llama_cpp(keys: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Source: ggml, src/ggml-cpu/ops.cpp, rope_yarn; llama.cpp, src/llama-context.cpp."""
    factor, trained = keys["factor"], keys.get("original_context_length", CONTEXT)

    def correction(rotations: float) -> float:
        return HEAD * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    start = max(0.0, math.floor(correction(keys.get("yarn_beta_fast", 32.0))))
    end = min(HEAD - 1.0, math.ceil(correction(keys.get("yarn_beta_slow", 1.0))))
    pairs = np.arange(HEAD // 2)
    whole = THETA ** (-2 * pairs / HEAD)
    mix = 1 - np.clip((pairs - start) / max(0.001, end - start), 0, 1)
    frequencies = whole / factor * (1 - mix) + whole * mix

    def scale_of(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1

    multiplier = keys.get("yarn_log_multiplier", 0.0)
    scale = scale_of(1.0) / (scale_of(multiplier) if multiplier else 1.0)
    scale /= 1 + 0.1 * math.log(factor)  # which rope_yarn multiplies again
    return frequencies, scale * (1 + 0.1 * math.log(factor)) * keys.get("attn_factor", 1.0)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0},
        {"attn_factor": 1.5},
        {"yarn_log_multiplier": 0.5},
        {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1 + 0.1 * math.log(8)},
        {"yarn_ext_factor": -1.0},
        {"original_context_length": 512},
    ],
)
def test_yarn(more: dict[str, Any]) -> None:
    keys = {"factor": 8.0} | more
    (frequencies, scale), (expected, expected_scale) = of_transformers(rope(type="yarn", **keys)), of_llama_cpp(keys)
    assert np.allclose(frequencies, expected, rtol=1e-5)
    assert scale == pytest.approx(expected_scale, rel=1e-6)


@pytest.mark.parametrize("key", ["factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(key: str) -> None:
    frequencies, _ = of_transformers(rope(**{key: 4.0}))
    assert np.allclose(frequencies, THETA ** (-2 * np.arange(HEAD // 2) / HEAD) / 4, rtol=1e-5)
    assert rope(type="none", factor=4.0) == rope() == {"rope_type": "default", "rope_theta": THETA}


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5},
        {"type": "yarn", "factor": 4.0, "yarn_attn_factor": 1.0},
        {"type": "linear", "factor": 4.0, "attn_factor": 1.5},
    ],
)
def test_what_transformers_does_not_compute_is_refused_by_key(scaling: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"no usable qwen3moe\.rope\.scaling\.{[*scaling][-1]}: "):
        rope(**scaling)
