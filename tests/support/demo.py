"""A tiny dense chat model that stands in for SmolLM2."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from offload_moe.demo.dense import DenseModel
from offload_moe.demo.split import CORRECTED, Split
from scripts.make_demo.recipe import Recipe

TINY_RECIPE = Recipe(
    num_shared=16,
    num_experts=8,
    top_k=4,
    num_sequences=8,
    num_positions=32,
    num_vocabulary=2,
    num_cluster_tokens=128,
    rank=2,
    num_steps=40,
    learning_rate=0.01,
    batch_size=2,
)


def tiny_split(seed: int = 0, *, correction: float = 0.02) -> Split:
    """The last two layers of `tiny_dense` in eight experts of four neurons, four chosen, and sixteen shared neurons."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.cat([torch.arange(8).repeat_interleave(4), torch.full((16,), 8)])
    groups = torch.stack([owners[torch.randperm(48, generator=generator)] for _ in range(2)]).to(torch.uint8)
    shapes = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    corrections = {
        module: (
            correction * torch.randn(2, shapes[module][0], 2, generator=generator),
            torch.randn(2, 2, shapes[module][1], generator=generator),
        )
        for module in CORRECTED
    }
    dense = tiny_dense()
    norms = {
        name: torch.stack([dense.tensors[f"model.layers.{layer}.{name}.weight"] for layer in range(3)])
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    return Split(
        groups=groups,
        router=0.001 * torch.randn(2, 8, 32, generator=generator),
        corrections=corrections,
        norms={**norms, "norm": dense.tensors["model.norm.weight"]},
        top_k=4,
    )


def byte_tokenizer() -> Tokenizer:
    """Bytes and three special tokens, padded with unused entries to 320."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    names += [f"<unused{i}>" for i in range(320 - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    return tokenizer


def tiny_dense(seed: int = 0) -> DenseModel:
    """Three layers of 48 neurons; fp32 weights that are exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    config = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    shapes = {"model.embed_tokens": (320, 32), "model.norm": (32,)}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.q_proj": (32, 32), f"{prefix}.self_attn.o_proj": (32, 32)}
        shapes |= {f"{prefix}.self_attn.k_proj": (16, 32), f"{prefix}.self_attn.v_proj": (16, 32)}
        shapes |= {f"{prefix}.mlp.gate_proj": (48, 32), f"{prefix}.mlp.up_proj": (48, 32)}
        shapes |= {f"{prefix}.mlp.down_proj": (32, 48)}
        shapes |= {f"{prefix}.input_layernorm": (32,), f"{prefix}.post_attention_layernorm": (32,)}
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * noise if len(shape) == 1 else 0.25 * noise
        tensors[f"{name}.weight"] = values.bfloat16().float()
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    return DenseModel(config=config, tensors=tensors, tokenizer=byte_tokenizer().to_str(), chat_template=template)
