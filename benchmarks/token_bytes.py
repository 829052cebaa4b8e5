"""The bytes that a decoded token must read, from the files of offload_moe and of llama.cpp."""

import json
import math
from pathlib import Path
from typing import Any


def of_store(folder: Path) -> dict[str, float]:
    """`experts` and `dense`: bytes per token without keys and values; an embedding table is read by a row."""
    from offload_moe.store import Store

    store = Store.open(folder)
    top_k = json.loads((folder / "config.json").read_text())["num_experts_per_tok"]
    dense = [entry for entry in store.dense.values() if not entry.name.endswith("embed_tokens.weight")]
    return _figures(
        top_k * sum(layer.record_bytes for layer in store.layers),
        sum(entry.place.num_bytes for entry in dense),
        top_k * sum(_num_weights(layer.shape) for layer in store.layers),
        sum(_num_weights(entry.quantized) if entry.quantized else math.prod(entry.shape) for entry in dense),
    )


def _num_weights(shape: Any) -> int:
    return sum(matrix.out_features * matrix.in_features for matrix in shape.matrices)


def of_gguf(file: Path, config: dict[str, Any]) -> dict[str, float]:
    """The same."""
    from gguf import GGUFReader
    from peers.gguf_shapes import num_experts

    tensors = [tensor for tensor in GGUFReader(file).tensors if tensor.name != "token_embd.weight"]
    experts = [tensor for tensor in tensors if "_exps." in tensor.name]
    dense = [tensor for tensor in tensors if "_exps." not in tensor.name]
    used = config["num_experts_per_tok"] / num_experts(config)
    return _figures(
        used * sum(int(tensor.n_bytes) for tensor in experts),
        sum(int(tensor.n_bytes) for tensor in dense),
        used * sum(int(tensor.n_elements) for tensor in experts),
        sum(int(tensor.n_elements) for tensor in dense),
    )


def _figures(experts: float, dense: float, expert_weights: float, dense_weights: float) -> dict[str, float]:
    return {
        "experts": experts,
        "dense": dense,
        "bits_per_expert_weight": 8 * experts / expert_weights,
        "bits_per_dense_weight": 8 * dense / dense_weights,
    }


def of_cache(config: Path, context: int) -> int:
    """Keys and values of so many tokens, or latents, in 16 bits. config: of the shape, in JSON."""
    import torch
    from transformers import AutoConfig

    from offload_moe.plan.parameters import describe_model
    from offload_moe.plan.working import cache_bytes

    return cache_bytes(describe_model(AutoConfig.from_pretrained(config)), context, torch.bfloat16)
