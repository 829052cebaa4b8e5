"""The dense chat model in memory, read from GGUF or safetensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.system.paths import CONFIG_NAME

if TYPE_CHECKING:
    from gguf import ReaderTensor

_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseModel:
    """A dense Llama-family chat model.

    `config` holds the keyword arguments of `LlamaConfig`; `tensors` has Hugging Face names, fp32, without `lm_head`
    when embeddings are tied; `tokenizer` is the text of `tokenizer.json`.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: str
    chat_template: str


def read_gguf(path: Path) -> DenseModel:
    """Read a Llama-family GGUF file; quantized blocks are expanded to fp32.

    Raises: CheckpointError when the file is not such a model.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = _gguf_config(fields)
        tensors = dict(_gguf_tensor(tensor, config) for tensor in reader.tensors)
        tokenizer = _gguf_tokenizer(fields)
        template = fields["tokenizer.chat_template"]
    except (KeyError, ValueError, OSError, IndexError) as error:
        raise CheckpointError(
            f"{path} is not a GGUF chat model of the Llama family: {error!r}. Fetch it again."
        ) from error
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return DenseModel(config=config, tensors=tensors, tokenizer=tokenizer, chat_template=template)


def _gguf_config(fields: dict[str, Any]) -> dict[str, Any]:
    if fields["general.architecture"] != "llama":
        raise ValueError(f"architecture {fields['general.architecture']!r}")
    return {
        "vocab_size": int(fields["llama.vocab_size"]),
        "hidden_size": int(fields["llama.embedding_length"]),
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": int(fields["llama.attention.head_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        # GGUF stores fp32: 9.99999974e-06 is 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
    }


def _gguf_tensor(tensor: "ReaderTensor", config: dict[str, Any]) -> tuple[str, Tensor]:
    from gguf.quants import dequantize

    stem = tensor.name.removesuffix(".weight")
    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    if not stem.startswith("blk."):
        return f"{_GGUF_NAMES[stem]}.weight", values
    _, layer, short = stem.split(".")
    if short in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if short == "attn_q" else "num_key_value_heads"]
        values = _unpermute(values, heads)
    return f"model.layers.{layer}.{_GGUF_LAYER_NAMES[short]}.weight", values


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """GGUF interleaves the two halves of each rotary head; Hugging Face keeps them apart."""
    head_dim = weight.shape[0] // num_heads
    return weight.reshape(num_heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def _gguf_tokenizer(fields: dict[str, Any]) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"pre-tokenizer {fields['tokenizer.ggml.pre']!r}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer.to_str()


def read_safetensors(folder: Path) -> DenseModel:
    """Read a Hugging Face folder of a Llama-family chat model with one `model.safetensors`.

    Raises: CheckpointError when the folder holds another kind of model.
    """
    from safetensors.torch import load_file

    settings = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    if settings.get("model_type") != "llama":
        raise CheckpointError(f"{folder} holds a {settings.get('model_type')!r} model, not a Llama. Fetch it again.")
    tokenizer_settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    keys = _CONFIG_KEYS & settings.keys()
    config = {key: settings[key] for key in sorted(keys)}
    if "rope_parameters" not in config:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": float(settings["rope_theta"])}
    config.setdefault("tie_word_embeddings", False)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    template = folder / "chat_template.jinja"
    return DenseModel(
        config=config,
        tensors=tensors,
        tokenizer=(folder / "tokenizer.json").read_text("utf-8"),
        chat_template=template.read_text("utf-8") if template.exists() else tokenizer_settings["chat_template"],
    )


_CONFIG_KEYS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
}
