"""The rotary embedding of a model out of a GGUF file's metadata.

Source: llama.cpp, src/llama-model.cpp (the keys) and src/llama-context.cpp (what follows from them).
"""

import math
from collections.abc import Sequence
from typing import Any

from offload_moe.checkpoint.gguf_metadata import MOST_TOKENS, Metadata
from offload_moe.errors import CheckpointError

DEFAULT_THETA = 10000.0
FACTORS = "rope_freqs.weight"  # by which frequencies are divided, as of Llama 3


def rotated(found: Metadata, width: int) -> int:
    """How much of a head of this width is rotated, in pairs. Raises: CheckpointError."""
    turned = found.count("rope.dimension_count", most=width)
    if turned % 2:
        raise found.unusable("rope.dimension_count", "an even number")
    return turned


def partly_rotated(found: Metadata) -> dict[str, Any]:
    """The rotation of a part of each head. Raises: CheckpointError."""
    width = found.count("attention.key_length")
    return rope_of(found) | {"partial_rotary_factor": rotated(found, width) / width}


def rope_of(found: Metadata) -> dict[str, Any]:
    """The rotation of whole heads. Raises: CheckpointError naming a key, or a kind of scaling."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": found.positive("rope.freq_base", DEFAULT_THETA)}
    kind = found.get("rope.scaling.type") or "linear"
    if kind == "yarn":
        return rope | _yarn(found)
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{found.path}: rotary scaling of type {kind!r} is not supported.")
    _refuse_others(found, "rope.scaling.attn_factor", 1.0)
    factor = found.positive("rope.scaling.factor", found.positive("rope.scale_linear", 1.0))
    return rope if kind == "none" or factor == 1 else rope | {"rope_type": "linear", "factor": factor}


def _yarn(found: Metadata) -> dict[str, Any]:
    """YaRN as transformers has it, which extrapolates whole; llama.cpp computes its own scale of cosine and sine."""
    factor = found.positive("rope.scaling.factor")
    trained = found.count("context_length", most=MOST_TOKENS)
    if found.get("rope.scaling.yarn_ext_factor") != -1:  # by which llama.cpp means that none is set
        _refuse_others(found, "rope.scaling.yarn_ext_factor", 1.0)
    scale = found.positive("rope.scaling.attn_factor", 1.0) * mscale(factor, 1.0)
    if multiplier := found.positive_or_none("rope.scaling.yarn_log_multiplier"):
        scale /= mscale(factor, multiplier)
    if found.architecture != "deepseek2":  # whose scale is of `deepseek_rope`
        _refuse_others(found, "rope.scaling.yarn_attn_factor", scale)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": found.count(
            "rope.scaling.original_context_length", trained, most=MOST_TOKENS
        ),
        "beta_fast": found.positive("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": found.positive("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": scale,
    }


def mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _refuse_others(found: Metadata, key: str, value: float) -> None:
    """Refuse any other value than the one that is computed here. Raises: CheckpointError."""
    if not math.isclose(found.positive(key, value), value, rel_tol=1e-4):
        raise found.unusable(key, f"{value:.6g}, which is what transformers computes,")


def deepseek_rope(found: Metadata) -> dict[str, Any]:
    """The rotation of what DeepSeek's heads have beside the latent. Raises: CheckpointError."""
    _refuse_others(found, "rope.scaling.attn_factor", 1.0)
    rope = rope_of(found)
    if rope["rope_type"] != "yarn":
        return rope
    # The converter writes a tenth of `mscale_all_dim`, which `mscale` equals in every published model.
    multiplier = 10.0 * found.positive("rope.scaling.yarn_log_multiplier")
    _refuse_others(found, "rope.scaling.yarn_attn_factor", 1.0)
    del rope["attention_factor"]
    return rope | {"mscale": multiplier, "mscale_all_dim": multiplier}


def with_factors(
    found: Metadata, rope: dict[str, Any], factors: Sequence[float], num_frequencies: int
) -> dict[str, Any]:
    """The rotation whose frequencies are divided by these: LongRoPE, with one set of factors for every length.

    Raises: CheckpointError for factors that are not as many positive numbers, or beside another kind of scaling.
    """
    if len(factors) != num_frequencies:
        raise CheckpointError(
            f"{found.path}: tensor {FACTORS} has {len(factors)} factors, where {num_frequencies} frequencies are. "
            "Download it again."
        )
    if not all(0 < factor < math.inf for factor in factors):
        raise CheckpointError(f"{found.path}: tensor {FACTORS} is damaged: {list(factors[:4])} ... Download it again.")
    if rope["rope_type"] != "default":
        raise CheckpointError(
            f"{found.path}: its frequencies are divided by {FACTORS}, and scaled in the way {rope['rope_type']!r}; "
            "these are not used together. Use a safetensors version of the model."
        )
    if all(factor == 1 for factor in factors):
        return rope
    return rope | {
        "rope_type": "longrope",
        "short_factor": [*factors],
        "long_factor": [*factors],
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": found.count("context_length", most=MOST_TOKENS),
    }
