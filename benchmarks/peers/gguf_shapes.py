"""What a GGUF file of a config.json holds, for the architectures that are measured: metadata and tensors.

Shapes are numpy's, [rows, columns]. Names and metadata are those of llama.cpp's converter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Config = dict[str, Any]
Kind = Literal["dense", "expert", "router", "norm", "bias"]


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    kind: Kind
    shape: tuple[int, ...]


@dataclass(slots=True)
class Model:
    """metadata: the writer's methods without `add_`, and their values."""

    architecture: str
    metadata: dict[str, Any]
    expert_type: str = "Q4_0"
    tensors: list[Tensor] = field(default_factory=list)


def model_of(config: Config) -> Model:
    """Raises: KeyError where there is no maker of that architecture."""
    return MAKERS[config["model_type"]](config)


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def num_experts(config: Config) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(int(config[name]) for name in names if config.get(name))


def expert_width(config: Config) -> int:
    return int(config.get("moe_intermediate_size") or config["intermediate_size"])


def _common(config: Config) -> dict[str, Any]:
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"],
        "head_count_kv": config["num_key_value_heads"],
        "key_length": head_dim(config),
        "value_length": head_dim(config),
        "rope_dimension_count": head_dim(config),
        "rope_freq_base": float(config.get("rope_theta") or 10000.0),
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "expert_count": num_experts(config),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": expert_width(config),
    }


def _assemble(model: Model, config: Config, layer: Callable[[int], Iterator[Tensor]]) -> Model:
    """Embedding, layers, head. llama.cpp reads one row of the embedding per token."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    model.tensors.append(Tensor("token_embd.weight", "dense", (vocabulary, hidden)))
    for index in range(config["num_hidden_layers"]):
        for tensor in layer(index):
            model.tensors.append(Tensor(f"blk.{index}.{tensor.name}", tensor.kind, tensor.shape))
    model.tensors.append(Tensor("output_norm.weight", "norm", (hidden,)))
    model.tensors.append(Tensor("output.weight", "dense", (vocabulary, hidden)))
    return model


def _attention(config: Config) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    query, key = (config[f"num_{name}_heads"] * head_dim(config) for name in ("attention", "key_value"))
    yield Tensor("attn_norm.weight", "norm", (hidden,))
    for name, rows in (("attn_q", query), ("attn_k", key), ("attn_v", key)):
        yield Tensor(f"{name}.weight", "dense", (rows, hidden))
    yield Tensor("attn_output.weight", "dense", (hidden, query))


def _experts(config: Config) -> Iterator[Tensor]:
    hidden, width, experts = config["hidden_size"], expert_width(config), num_experts(config)
    yield Tensor("ffn_gate_inp.weight", "router", (experts, hidden))
    yield Tensor("ffn_gate_exps.weight", "expert", (experts, width, hidden))
    yield Tensor("ffn_up_exps.weight", "expert", (experts, width, hidden))
    yield Tensor("ffn_down_exps.weight", "expert", (experts, hidden, width))


def _mlp(hidden: int, width: int, suffix: str) -> Iterator[Tensor]:
    yield Tensor(f"ffn_gate{suffix}.weight", "dense", (width, hidden))
    yield Tensor(f"ffn_up{suffix}.weight", "dense", (width, hidden))
    yield Tensor(f"ffn_down{suffix}.weight", "dense", (hidden, width))


def mixtral(config: Config) -> Model:
    def layer(_: int) -> Iterator[Tensor]:
        yield from _attention(config)
        yield Tensor("ffn_norm.weight", "norm", (config["hidden_size"],))
        yield from _experts(config)

    return _assemble(Model("llama", _common(config)), config, layer)


def qwen3_moe(config: Config) -> Model:
    return _with_query_norms("qwen3moe", config, query=head_dim(config), key=head_dim(config))


def olmoe(config: Config) -> Model:
    """Its norms span all heads; its experts' width is the feed-forward length."""
    query, key = (config[f"num_{name}_heads"] * head_dim(config) for name in ("attention", "key_value"))
    return _with_query_norms("olmoe", config, query=query, key=key)


def _with_query_norms(architecture: str, config: Config, *, query: int, key: int) -> Model:
    def layer(_: int) -> Iterator[Tensor]:
        yield from _attention(config)
        yield Tensor("attn_q_norm.weight", "norm", (query,))
        yield Tensor("attn_k_norm.weight", "norm", (key,))
        yield Tensor("ffn_norm.weight", "norm", (config["hidden_size"],))
        yield from _experts(config)

    return _assemble(Model(architecture, _common(config)), config, layer)


def deepseek_v2(config: Config) -> Model:
    """Without low-rank queries, which llama.cpp knows by 27 layers (it calls that *lite*).

    Keys and values stay latent, as its converter writes them: one head of latents and rotary part.
    """
    if config["num_hidden_layers"] != 27 or config.get("q_lora_rank"):
        raise ValueError("llama.cpp reads a deepseek2 file without low-rank queries only with 27 layers")
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    metadata = _common(config) | {
        "head_count_kv": 1,
        "key_length": latent + rope,
        "value_length": latent,
        "key_length_mla": nope + rope,
        "value_length_mla": value,
        "kv_lora_rank": latent,
        "rope_dimension_count": rope,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
    }

    def layer(index: int) -> Iterator[Tensor]:
        yield Tensor("attn_norm.weight", "norm", (hidden,))
        yield Tensor("attn_q.weight", "dense", (heads * (nope + rope), hidden))
        yield Tensor("attn_kv_a_mqa.weight", "dense", (latent + rope, hidden))
        yield Tensor("attn_kv_a_norm.weight", "norm", (latent,))
        yield Tensor("attn_k_b.weight", "dense", (heads, latent, nope))
        yield Tensor("attn_v_b.weight", "dense", (heads, value, latent))
        yield Tensor("attn_output.weight", "dense", (hidden, heads * value))
        yield Tensor("ffn_norm.weight", "norm", (hidden,))
        if index < config["first_k_dense_replace"]:
            yield from _mlp(hidden, config["intermediate_size"], "")
        else:
            yield from _experts(config)
            yield from _mlp(hidden, expert_width(config) * config["n_shared_experts"], "_shexp")

    return _assemble(Model("deepseek2", metadata), config, layer)


def gpt_oss(config: Config) -> Model:
    """Experts in MXFP4, as they are published."""
    hidden, width, experts = config["hidden_size"], expert_width(config), num_experts(config)
    query, key = (config[f"num_{name}_heads"] * head_dim(config) for name in ("attention", "key_value"))
    metadata = _common(config) | {
        "sliding_window": config["sliding_window"],
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": config["rope_scaling"]["factor"],
        "rope_scaling_orig_ctx_len": config["rope_scaling"]["original_max_position_embeddings"],
    }

    def layer(_: int) -> Iterator[Tensor]:
        yield from _attention(config)
        yield Tensor("post_attention_norm.weight", "norm", (hidden,))
        yield Tensor("attn_sinks.weight", "bias", (config["num_attention_heads"],))
        for name, length in (("attn_q", query), ("attn_k", key), ("attn_v", key), ("attn_output", hidden)):
            yield Tensor(f"{name}.bias", "bias", (length,))
        yield from _experts(config)
        yield Tensor("ffn_gate_inp.bias", "bias", (experts,))
        for name, length in (("gate", width), ("up", width), ("down", hidden)):
            yield Tensor(f"ffn_{name}_exps.bias", "bias", (experts, length))

    return _assemble(Model("gpt-oss", metadata, expert_type="MXFP4"), config, layer)


MAKERS: dict[str, Callable[[Config], Model]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v2": deepseek_v2,
    "gpt_oss": gpt_oss,
}
