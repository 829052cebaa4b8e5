"""Random blocks of GGUF's types, for measurements of speed: codes of all values under scales of about 0.01."""

import numpy as np
import torch
from torch import Tensor

from offload_moe.quant.gguf import GgufType

# Where a block has fp16 numbers, and where an exponent.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}


def random_blocks(kind: GgufType, rows: int, columns: int) -> Tensor:
    """uint8 ``[rows, bytes of a row]``: the same for the same arguments."""
    import gguf

    if kind.is_plain:
        numbers = np.random.default_rng([rows, columns]).normal(0, 0.02, (rows, columns)).astype(np.float32)
        return torch.from_numpy(gguf.quantize(numbers, gguf.GGMLQuantizationType[kind.name]).view(np.uint8))
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    generator = np.random.default_rng([rows, columns])
    blocks = generator.integers(0, 256, (rows * columns // block, num_bytes), dtype=np.uint8)
    for offset in HALVES[kind.name]:
        scales = generator.uniform(0.005, 0.02, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    if not HALVES[kind.name]:
        blocks[:, 0] = generator.integers(115, 122, len(blocks))
    return torch.from_numpy(blocks.reshape(rows, -1))
