"""Which type each matrix of a GGUF file has: Q4_0 throughout, or llama.cpp's mixture Q4_K_M, by its own rules."""

import re

from peers.gguf_shapes import Model, Tensor

SUPERBLOCK = 256
MIXTURES = ("Q4_0", "Q4_K_M")
OF_NARROW_ROWS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # whose columns are no whole superblocks


def matrix_type(mixture: str, model: Model, tensor: Tensor) -> str:
    """The type of a matrix; of routers, norms and biases F32."""
    if tensor.kind not in ("dense", "expert"):
        return "F32"
    if mixture == "Q4_0" or model.expert_type == "MXFP4":
        return model.expert_type if tensor.kind == "expert" else "Q4_0"
    kind = _in_q4_k_m(tensor.name, model.metadata["block_count"], model.metadata["expert_count"])
    return kind if tensor.shape[-1] % SUPERBLOCK == 0 else OF_NARROW_ROWS.get(kind, kind)


def _in_q4_k_m(name: str, num_layers: int, num_experts: int) -> str:
    if name == "output.weight":
        return "Q6_K"
    in_layer = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
    if in_layer is None:
        return "Q4_K"
    layer, what = int(in_layer[1]), in_layer[2]
    if num_experts == 8 and what in ("attn_v", "attn_k"):
        return "Q8_0"
    if num_experts == 8 and what == "attn_output":
        return "Q5_K"
    is_wide = what == "attn_v" or what.startswith("ffn_down")
    return "Q6_K" if is_wide and _has_more_bits(layer, num_layers) else "Q4_K"


def _has_more_bits(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and one in three between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
