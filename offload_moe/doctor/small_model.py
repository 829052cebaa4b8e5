"""A small random Qwen2-MoE, its stores, and the oracle: transformers' eager code on its weights."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from offload_moe.checkpoint.experts import find_experts
from offload_moe.convert.quantize import quantize
from offload_moe.families.cache_name import cache_from, with_cache
from offload_moe.families.text_model import TextModel
from offload_moe.quant import get_codec
from offload_moe.store import Store

CODECS = ("bf16", "int8", "nf4")
NUM_LAYERS, NUM_EXPERTS, HIDDEN = 3, 8, 128
PROMPT_LENGTH, NUM_STEPS, VOCABULARY = 16, 5, 256  # long enough to use every expert of every layer
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


class SmallModel:
    """The checkpoint and one store per codec, in a folder that the caller deletes."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint"
        _write_checkpoint(self.checkpoint)
        self.stores = {
            codec: Store.open(quantize(self.checkpoint, folder / codec, codec=codec, dense_codec="bf16"))
            for codec in CODECS
        }

    def oracle(self, codec: str, device: torch.device) -> TextModel:
        """transformers' own model in fp32, its experts replaced by the decoded records of the store."""
        from transformers import AutoModelForCausalLM

        made = AutoModelForCausalLM.from_pretrained(
            self.checkpoint, dtype=torch.float32, experts_implementation="eager", local_files_only=True
        )
        hf = cast("TextModel", made)
        store = self.stores[codec]
        for ordinal, layer in enumerate(find_experts(hf)):
            for expert in range(layer.num_experts):
                record = store.read_expert(ordinal, expert)
                for name, value in get_codec(codec).decode(layer.shape, record, torch.float32).items():
                    getattr(layer.module, name).data[expert] = value
        return hf.to(device).eval()


def logits_of(hf: TextModel) -> Tensor:
    """Logits of a prompt and of steps with the cache, on the CPU, ``[positions, vocabulary]``.

    The tokens are fixed, so that a small difference does not change later tokens.
    """
    tokens = torch.arange(PROMPT_LENGTH + NUM_STEPS) * 37 % VOCABULARY
    pieces = [tokens[:PROMPT_LENGTH], *tokens[PROMPT_LENGTH:].split(1)]
    logits, cache = [], None
    with torch.inference_mode():
        for piece in pieces:
            out = hf(input_ids=piece[None].to(hf.device), **with_cache(cache), use_cache=True)
            cache = cache_from(out)
            logits.append(out.logits[0].float())
    return torch.cat(logits).cpu()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number; infinite where a number is not finite."""
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if torch.isfinite(found).all() else float("inf")


def _write_checkpoint(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen2_moe", **CONFIG)
    generator = torch.Generator().manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in hf.named_parameters():
        if "norm" not in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(torch.bfloat16)
    hf.save_pretrained(folder)
