"""The rotary embedding of a model out of a GGUF file's metadata."""

from typing import Any

from offload_moe.checkpoint.gguf_metadata import MOST_TOKENS, Metadata
from offload_moe.errors import CheckpointError

DEFAULT_THETA = 10000.0


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
    kind = found.get("rope.scaling.type")
    if kind in (None, "none"):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": found.positive("rope.scaling.factor")}
    if kind != "yarn":
        raise CheckpointError(f"{found.path}: rotary scaling of type {kind!r} is not supported.")
    return rope | {
        "rope_type": "yarn",
        "factor": found.positive("rope.scaling.factor"),
        "original_max_position_embeddings": found.count("rope.scaling.original_context_length", most=MOST_TOKENS),
    }


def deepseek_rope(found: Metadata) -> dict[str, Any]:
    """The rotation of what DeepSeek's heads have beside the latent. Raises: CheckpointError."""
    rope = rope_of(found)
    if rope["rope_type"] != "yarn":
        return rope
    # The converter writes a tenth of `mscale_all_dim`, which `mscale` equals in every published model.
    scale = 10.0 * found.positive("rope.scaling.yarn_log_multiplier")
    return rope | {"mscale": scale, "mscale_all_dim": scale, "beta_fast": 32, "beta_slow": 1}
