"""Small stores whose layers are native throughout, one for each kind of attention and block."""

from pathlib import Path
from typing import Any

from offload_moe.convert.quantize import quantize
from tests.support.checkpoints import write_checkpoint

# A dense layer, one without rotation, and chunks that short contexts leave.
LLAMA4 = {"moe_layers": [1, 2], "no_rope_layers": [1, 0, 1], "attention_chunk_size": 12, "floor_scale": 4}
# family, changes, codec
STORES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral, nf4": ("mixtral", {}, "nf4"),
    "qwen3_moe, int8": ("qwen3_moe", {}, "int8"),
    "olmoe, nf4": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}, "nf4"),
    "qwen2_moe, nf4": ("qwen2_moe", {"shared_expert_intermediate_size": 48}, "nf4"),
    "phimoe, nf4": ("phimoe", {"router_jitter_noise": 0.2, "attention_bias": True, "lm_head_bias": True}, "nf4"),
    "gpt_oss, int8": ("gpt_oss", {"sliding_window": 16}, "int8"),
    "deepseek_v3, nf4": ("deepseek_v3", {"qk_rope_head_dim": 16}, "nf4"),
    "llama4, nf4": ("llama4_text", LLAMA4 | {"num_experts_per_tok": 2}, "nf4"),
}


def write_stores(folder: Path) -> dict[str, Path]:
    """All of them, by name."""
    made = {}
    for number, (name, (family, changes, codec)) in enumerate(STORES.items()):
        write_checkpoint(folder / f"{number}", family, **{"head_dim": 16, "hidden_size": 64} | changes)
        made[name] = quantize(folder / f"{number}", folder / f"{number}-store", codec=codec)
    return made
