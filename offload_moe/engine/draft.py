"""A draft model: any causal language model of the same vocabulary, on the CPU, its large matrices in int8."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from offload_moe.checkpoint.linears import projection_linears
from offload_moe.checkpoint.skeleton import build_skeleton, load_config
from offload_moe.checkpoint.source import resolve_source
from offload_moe.checkpoint.tokenizer import load_tokenizer
from offload_moe.decode import make_fast
from offload_moe.decode.dense import QuantLinear, quantize_linear
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.families.text_model import TextModel
from offload_moe.plan.hub import fetch_config
from offload_moe.quant import get_codec
from offload_moe.quant.layout import weight_shape
from offload_moe.store import is_store
from offload_moe.system.names import check_source, hub_name, resolve

CODEC = "int8"
KEPT = torch.bfloat16  # keys and values


@dataclass(frozen=True, slots=True)
class DraftFiles:
    """A draft that is not loaded yet. skeleton: on the meta device."""

    folder: Path
    skeleton: TextModel

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token of one conversation."""
        return _cache_elements(self.skeleton.config) * KEPT.itemsize

    def num_bytes(self, context: int) -> int:
        """What it takes in memory: weights, keys and values of so many tokens of one conversation."""
        quantized = _quantized(self.skeleton)
        records = sum(_record_bytes(linear) for linear in quantized.values())
        inside = {f"{name}.weight" for name in quantized}
        others = sum(4 * value.numel() for name, value in self.skeleton.named_parameters() if name not in inside)
        return records + others + context * self.token_bytes


def find_draft(name: str | Path, *, token: str | None = None) -> DraftFiles:
    """The files of a checkpoint folder or hub id, downloaded where necessary.

    Raises:
        CheckpointError, UnsupportedModelError, TransferError: it cannot be read.
        ConfigError: tokens cannot be taken back out of its state, or it is a store.
    """
    if is_store(resolve(name)):
        raise ConfigError(f"{name} is a store. A draft model is read from a checkpoint: give its folder or its hub id.")
    return _files_of(name, resolve_source(name, token=token).folder)


def draft_to_plan(name: str | Path) -> DraftFiles:
    """As `find_draft`, without weights: of a hub id only the config is downloaded."""
    repository, revision = hub_name(name)
    if resolve(repository).exists():
        return find_draft(name)
    check_source(repository)
    return _files_of(name, fetch_config(str(repository), revision=revision, token=None).folder)


def _files_of(name: str | Path, folder: Path) -> DraftFiles:
    skeleton = build_skeleton(load_config(folder))
    config = skeleton.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if skeleton.config.is_encoder_decoder or not all(type(layer) is DynamicLayer for layer in layers):
        raise ConfigError(
            f"{name} cannot be a draft: tokens cannot be taken back out of its state (sliding windows, recurrent "
            "layers). Choose a model whose layers all attend to the whole text."
        )
    return DraftFiles(folder, skeleton)


def load_draft(files: DraftFiles, vocabulary: dict[str, int], context: int) -> Any:
    """The draft for a model with this vocabulary.

    Raises: ConfigError where its tokens are others; CheckpointError when it cannot be read.
    """
    tokenizer, reason = load_tokenizer(files.folder)
    _check_vocabulary(files.folder, tokenizer, reason, vocabulary)
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # a model class may raise anything for missing or foreign files
        raise CheckpointError(f"The draft {files.folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    for name, linear in _quantized(hf).items():
        _replace(hf, name, linear)
    hf = hf.float().eval().requires_grad_(False)
    make_fast(hf, is_exact=False, context=context, kept=KEPT)
    return hf


def _check_vocabulary(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, reason: str, vocabulary: dict[str, int]
) -> None:
    if tokenizer is None:
        raise ConfigError(f"The draft {folder} has no tokenizer to compare vocabularies with. {reason}")
    others = tokenizer.get_vocab()
    if others != vocabulary:
        num_alike = len(others.items() & vocabulary.items())
        raise ConfigError(
            f"The draft {folder} has another vocabulary: {num_alike:,} of its {len(others):,} tokens are among the "
            f"{len(vocabulary):,} of the model. Choose a draft of the same family."
        )


def _quantized(hf: nn.Module) -> dict[str, nn.Linear]:
    """The matrices that are kept in int8, the output head among them."""
    found = projection_linears(hf)
    head = hf.get_output_embeddings()  # type: ignore[operator]
    heads = {name: module for name, module in hf.named_modules() if module is head and type(module) is nn.Linear}
    return found | heads


def _replace(hf: nn.Module, name: str, linear: nn.Linear) -> None:
    quantized: QuantLinear = quantize_linear(linear.weight.detach(), get_codec(CODEC))
    quantized.bias = linear.bias
    hf.set_submodule(name, quantized)


def _record_bytes(linear: nn.Linear) -> int:
    return get_codec(CODEC).layout(weight_shape(linear.out_features, linear.in_features)).num_bytes


def _cache_elements(config: Any) -> int:
    """Keys and values of one token."""
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * num_heads * head_dim)
