"""Records of GGUF's types with random blocks, and what the `gguf` package decodes them to."""

from collections.abc import Sequence

import gguf
import numpy as np
import torch
from torch import Tensor

from offload_moe.native import kernels
from offload_moe.quant import ExpertShape, Matrix, RecordLayout
from offload_moe.quant.gguf import TYPES, GgufCodec, gguf_codec

# Where a block has fp16 numbers. IQ2_XXS has no kernel.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
    "IQ2_XXS": (0,),
}
PLAIN = tuple(kind for kind in TYPES if TYPES[kind].is_plain)
QUANTIZED = tuple(kind for kind in TYPES if kind not in PLAIN)


def random_rows(kind: str, rows: int, columns: int, seed: Sequence[int] = (0,)) -> np.ndarray:
    """uint8 ``[rows, row bytes]``: random codes under scales of either sign, or numbers; some of them subnormal."""
    if kind in PLAIN:
        generator = np.random.default_rng([*seed, rows, columns])
        sizes = 10.0 ** generator.integers(-7, 1, (rows, columns))
        numbers = (generator.normal(0, 1, (rows, columns)) * sizes).astype(np.float32)
        return gguf.quantize(numbers, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng([*seed, rows, columns])
    blocks = generator.integers(0, 256, (rows * columns // block, num_bytes), dtype=np.uint8)
    for offset in HALVES[kind]:
        scales = generator.normal(0, 0.02, len(blocks)) * 10.0 ** generator.integers(-4, 1, len(blocks))
        blocks[:, offset : offset + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = generator.integers(110, 131, len(blocks))
    return blocks.reshape(rows, -1)


def spoil_blocks(kind: str, memory: np.ndarray) -> None:
    """NaN, zero, infinite and subnormal scales in every seventh block of uint8 in a file's order."""
    blocks = memory.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    for offset in HALVES[kind]:
        halves = np.resize(np.array([np.nan, 0.0, np.inf, 3e-7], np.float16), len(blocks[::7]))
        blocks[::7, offset : offset + 2] = halves[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[::7, 0] = np.resize(np.array([255, 0, 254, 1], np.uint8), len(blocks[::7]))


def with_scales_of_one_half(kind: str, rows: np.ndarray) -> np.ndarray:
    """The same codes ``[rows, row bytes]`` under fp16 scales of 0.5, or an exponent of 0."""
    _, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rows.reshape(-1, num_bytes).copy()
    for offset in HALVES[kind]:
        blocks[:, offset : offset + 2] = np.array([0.5], np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = 127
    return blocks.reshape(rows.shape)


def decoded(kind: str, rows: np.ndarray) -> np.ndarray:
    """fp64 ``[rows, columns]``."""
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]).astype(np.float64)


class GgufMatrix:
    """One matrix of a type, as a record in rows."""

    def __init__(self, kind: str, rows: int, columns: int, *, has_bias: bool = False) -> None:
        self.kind = kind
        self.codec: GgufCodec = gguf_codec([kind])
        self.shape = ExpertShape(
            matrices=(Matrix(name="weight", out_features=rows, in_features=columns),),
            biases=(("bias", rows),) if has_bias else (),
        )
        self.layout: RecordLayout = self.codec.layout(self.shape)
        self.raw = random_rows(kind, rows, columns)
        tensors = {"weight.codes": torch.from_numpy(self.raw)}
        if has_bias:
            tensors["bias"] = torch.linspace(-1, 1, rows)
        self.record = self.codec.encode(self.shape, tensors)

    @property
    def weight(self) -> np.ndarray:
        """fp64 ``[rows, columns]``, as `gguf` decodes it."""
        return decoded(self.kind, self.raw)

    def in_panels(self) -> Tensor:
        repacked = self.record.clone()
        kernels.PanelOrder(self.codec.name, self.shape, self.layout).to_panels(repacked)
        return repacked

    def times(self, x: Tensor, record: Tensor | None = None) -> Tensor:
        """The product with fp32 ``[T, columns]``; record: in panels."""
        kernel = kernels.LinearKernel(self.codec.name, [self.shape], [self.layout], num_parts=1)
        out = torch.full((len(x), self.shape.matrices[0].out_features), 7.0)
        kernel.forward(x, [self.in_panels() if record is None else record], [out])
        return out


def columns_of(kind: str) -> tuple[int, ...]:
    """Widths with an odd and an even number of chunks, the last one long; multiples of 64."""
    step = max(64, TYPES[kind].columns)
    return (step, 3 * step, 1024)
