"""Writing the split model as an ordinary Qwen2-MoE checkpoint folder.

Qwen2-MoE adds the chosen experts with weights that sum to one, and the shared expert times a sigmoid. The split model
needs plain sums, so `down_proj` is scaled:

- K router logits that are nearly equal give K weights of 1/K: each expert's `down_proj` is multiplied by K;
- an all-zero `shared_expert_gate` gives sigmoid(0) = 1/2: the shared expert's `down_proj` is multiplied by 2.

Shapes: H hidden, I intermediate, S shared, E experts, W neurons of one expert; E * W + S = I.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.demo.dense import DenseModel
from offload_moe.demo.split import CORRECTED, Split
from offload_moe.system.full_disk import ELSEWHERE, full_disk_named

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
# A model this small repeats itself under greedy decoding.
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_checkpoint(folder: Path, dense: DenseModel, split: Split, dtype: torch.dtype) -> None:
    """Write config, tokenizer, generation config and weights into the existing `folder`.

    Raises: BudgetError for a full disk, another OSError.
    """
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in moe_tensors(dense, split)}
    with full_disk_named(folder, sum(tensor.nbytes for tensor in tensors.values()), ELSEWHERE):
        _write_weights(folder / "model.safetensors", tensors)
        _write_config(folder, dense, split, dtype)
        _write_tokenizer(folder, dense)


def moe_tensors(dense: DenseModel, split: Split) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, by its Qwen2-MoE name."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in dense.tensors:
            yield name, dense.tensors[name]
    yield "model.norm.weight", split.norms["norm"]
    num_dense = dense.config["num_hidden_layers"] - split.num_layers
    for layer in range(dense.config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in _LAYER_NORMS:
            yield f"{prefix}.{norm}.weight", split.norms[norm][layer]
        for module in _ATTENTION:
            yield f"{prefix}.{module}.weight", dense.tensors[f"{prefix}.{module}.weight"]
        if layer < num_dense:
            for module in CORRECTED:
                yield f"{prefix}.mlp.{module}.weight", dense.tensors[f"{prefix}.mlp.{module}.weight"]
        else:
            yield from _moe_layer(dense, f"{prefix}.mlp", split, layer - num_dense)


def _moe_layer(dense: DenseModel, prefix: str, split: Split, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Router, shared expert and experts of one layer."""
    gate, up, down = (
        split.corrected(layer, module, dense.tensors[f"{prefix}.{module}.weight"]) for module in CORRECTED
    )
    yield f"{prefix}.gate.weight", split.router[layer]
    yield f"{prefix}.shared_expert_gate.weight", torch.zeros(1, gate.shape[1])
    shared, routed = split.members(layer)
    groups = [("shared_expert", shared, 2.0)]
    groups += [(f"experts.{expert}", neurons, float(split.top_k)) for expert, neurons in enumerate(routed)]
    for name, neurons, scale in groups:
        yield f"{prefix}.{name}.gate_proj.weight", gate[neurons]
        yield f"{prefix}.{name}.up_proj.weight", up[neurons]
        yield f"{prefix}.{name}.down_proj.weight", down[:, neurons] * scale


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises: OSError, of which the library gives only the number, in its text."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        code = int(found[1])  # on Windows another number than Python's, which is made of it
        raise OSError(code, os.strerror(code), str(path), code) from error


def _write_config(folder: Path, dense: DenseModel, split: Split, dtype: torch.dtype) -> None:
    from transformers import GenerationConfig, Qwen2MoeConfig

    shared, routed = split.members(0)
    num_dense = dense.config["num_hidden_layers"] - split.num_layers
    config = Qwen2MoeConfig(
        **dense.config,
        num_experts=split.num_experts,
        num_experts_per_tok=split.top_k,
        moe_intermediate_size=routed.shape[1],
        shared_expert_intermediate_size=len(shared),
        mlp_only_layers=list(range(num_dense)),
        norm_topk_prob=True,
        qkv_bias=False,
        architectures=["Qwen2MoeForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    config.save_pretrained(folder)
    special = {key: dense.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special, **_SAMPLING).save_pretrained(folder)


def _write_tokenizer(folder: Path, dense: DenseModel) -> None:
    """A tokenizer class that uses `tokenizer.json` unchanged: GPT2Tokenizer would drop the splitting of digits."""
    (folder / "tokenizer.json").write_text(dense.tokenizer, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(dense.chat_template, encoding="utf-8")
    special = {name: _token(dense, dense.config[f"{name}_id"]) for name in ("bos_token", "eos_token", "pad_token")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": dense.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _token(dense: DenseModel, number: int) -> str:
    from tokenizers import Tokenizer

    token = Tokenizer.from_str(dense.tokenizer).id_to_token(number)
    assert token is not None
    return str(token)
