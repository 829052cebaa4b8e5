"""The config of a model out of a GGUF file's metadata, for architectures that are read as they lie.

Source: llama.cpp, conversion/*.py (what each converter writes) and src/llama-model.cpp (what each architecture does).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.gguf_families import FAMILIES, Family
from offload_moe.checkpoint.gguf_metadata import MOST_EXPERTS, MOST_HEADS, MOST_TOKENS, Metadata, Shapes
from offload_moe.checkpoint.gguf_rope import rope_of
from offload_moe.errors import CheckpointError


def config_of(path: Path, values: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """`config.json` of the model. values: of the metadata. shapes: of the file's tensors, by name.

    Raises: CheckpointError for an architecture that is not read as it lies, or metadata that is not usable.
    """
    found = Metadata(path, values, shapes)
    family = FAMILIES.get(found.architecture)
    if family is None:
        raise CheckpointError(
            f"{path} is a GGUF file of architecture {found.architecture!r}; {', '.join(FAMILIES)} can be used as they "
            "lie. Use a safetensors version of the model."
        )
    if found.architecture == "llama" and not found.get("expert_count"):
        raise CheckpointError(f"{path} is a model without experts (llama.expert_count). Use llama.cpp for it.")
    vocabulary, width = found.shape("token_embd.weight", 2)
    config = {
        **_sizes(found),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in found.shapes,
        "dtype": "bfloat16",
        "rope_parameters": rope_of(found),
        **_special_tokens(found, vocabulary),
    }
    if config["hidden_size"] != width:
        raise found.unusable("embedding_length", f"{width}, the width of token_embd.weight,")
    _check_routing(found, family)
    config |= family.make(found)
    _check_heads(found, family, config)
    return config


def _sizes(found: Metadata) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "num_hidden_layers": found.num_layers,
        "hidden_size": found.count("embedding_length"),
        "num_attention_heads": found.count("attention.head_count", most=MOST_HEADS),
        "num_key_value_heads": found.count("attention.head_count_kv", most=MOST_HEADS),
        "max_position_embeddings": found.count("context_length", most=MOST_TOKENS),
    }
    experts = found.count("expert_count", most=MOST_EXPERTS)
    sizes["num_experts_per_tok"] = found.count("expert_used_count", most=experts)
    if found.get("feed_forward_length") is not None:
        sizes["intermediate_size"] = found.count("feed_forward_length", least=0)
    if found.get("attention.key_length") is not None:
        sizes["head_dim"] = found.count("attention.key_length")
    if found.get("attention.layer_norm_rms_epsilon") is not None:
        sizes["rms_norm_eps"] = found.positive("attention.layer_norm_rms_epsilon")
    return sizes


def _special_tokens(found: Metadata, vocabulary: int) -> dict[str, int]:
    tokens = {}
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        token = found.values.get(key)
        if token is not None and not (type(token) is int and 0 <= token < vocabulary):
            raise CheckpointError(
                f"{found.path}: {key} is {token!r}, which is none of its {vocabulary} tokens. Download it again."
            )
        if token is not None:
            tokens[f"{name}_token_id"] = token
    return tokens


def _check_routing(found: Metadata, family: Family) -> None:
    """Refuse what is said about the choice of experts and would not be computed. Raises: CheckpointError."""
    gate, norm = found.get("expert_gating_func"), found.get("expert_weights_norm")
    if gate and gate not in family.gates:
        allowed = " or ".join(map(str, family.gates))
        raise found.unusable("expert_gating_func", f"{allowed}, which models of this architecture compute,")
    if norm is not None and found.flag("expert_weights_norm") not in family.norms:
        raise found.unusable("expert_weights_norm", f"{family.norms[0]}, which models of this architecture compute,")
    num_groups = found.count("expert_group_count", 0, least=0, most=found.count("expert_count"))
    if num_groups > 1 and not family.has_groups:
        raise found.unusable("expert_group_count", "1, as models of this architecture have no groups,")


def _check_heads(found: Metadata, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse heads that cannot be computed. Raises: CheckpointError."""
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % keys:
        raise found.refused("attention.head_count_kv", f"is {keys}, which does not divide {heads} heads")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise found.refused("attention.head_count", f"is {heads}, which does not divide {config['hidden_size']}")
    width = config.get("head_dim") or config["hidden_size"] // heads
    turned = found.get("rope.dimension_count")
    if not family.is_partly_rotated and (width % 2 or turned not in (None, width)):
        raise found.refused("rope.dimension_count", f"is {turned!r} for heads of {width}, which are rotated whole")
