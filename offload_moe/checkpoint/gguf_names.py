"""What the tensors of a GGUF file are called in transformers, for the architectures whose weights are known to agree.

Source: gguf-py, gguf/constants.py and tensor_mapping.py; llama.cpp, convert_hf_to_gguf.py.
"""

import re

# llama.cpp's names. Its `llama` is Mixtral here: a dense model is refused later.
ARCHITECTURES = ("llama", "qwen2moe", "qwen3moe", "olmoe")
PERMUTED = ("llama",)  # rows of query and key are in the order of another rotary embedding

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_UNUSED = re.compile(r"rope_freqs\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def transformers_name(name: str) -> str | None:
    """The name in transformers; one that does not change is unknown, None is not needed."""
    if _UNUSED.fullmatch(name):
        return None
    stem, _, kind = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_BLOCK:
        return name
    inside = _IN_BLOCK[match[2]]
    prefix = f"model.layers.{match[1]}.{inside}"
    return prefix if inside.startswith("mlp.experts.") else f"{prefix}.{match[3]}"


def fused_experts(name: str) -> tuple[str, str] | None:
    """For the gate half of fused experts: the name of the up half, and of both in transformers."""
    match = re.fullmatch(r"blk\.(\d+)\.ffn_gate_exps\.weight", name)
    if match is None:
        return None
    return f"blk.{match[1]}.ffn_up_exps.weight", f"model.layers.{match[1]}.mlp.experts.gate_up_proj"
