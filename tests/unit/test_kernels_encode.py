"""Native quantization gives the bytes of bitsandbytes and of the int8 codec."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.native import kernels
from offload_moe.quant import CODECS, ExpertShape, Matrix
from offload_moe.quant.int8 import Int8Codec


def boundaries() -> Tensor:
    code = get_4bit_type("nf4", device="cpu")
    middles = (code[1:] + code[:-1]) / 2
    block = torch.zeros(64)
    block[:15], block[15], block[16:31] = middles, 1.0, -middles
    return block.repeat(4, 4)


CASES = {
    "random": torch.randn(96, 448, generator=torch.Generator().manual_seed(0)),
    "many": torch.randn(1024, 512, generator=torch.Generator().manual_seed(1)),
    "outliers": torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) ** 5,
    "constant": torch.full((8, 256), 0.3),
    "zero": torch.zeros(16, 256),
    "subnormal": torch.randn(8, 256, generator=torch.Generator().manual_seed(3)) * 1e-40,
    "all scales": torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    * torch.logspace(-30, 3, 64)[:, None],
    "one block": torch.randn(1, 64, generator=torch.Generator().manual_seed(5)),
    "boundaries": boundaries(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_nf4_has_the_bits_of_bitsandbytes(case: str, dtype: torch.dtype) -> None:
    values = CASES[case].to(dtype)
    packed, state = quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    planes = kernels.encode_nf4(values)
    assert torch.equal(planes["codes"].flatten(), packed.flatten())
    assert torch.equal(planes["absmax"], state.absmax)
    assert torch.equal(planes["absmax_scale"], state.state2.absmax)
    assert torch.equal(planes["absmax_offset"], state.offset.view(1))


@pytest.mark.parametrize("case", CASES)
def test_int8_has_the_bits_of_the_codec(case: str) -> None:
    planes, expected = kernels.encode_int8(CASES[case]), Int8Codec().encode_matrix(CASES[case])
    assert torch.equal(planes["codes"], expected["codes"])
    assert torch.equal(planes["scales"], expected["scales"])


SHAPE = ExpertShape(
    matrices=(
        Matrix(name="gate_up_proj", out_features=48, in_features=80),
        Matrix(name="down_proj", out_features=80, in_features=24),
    ),
    biases=(("gate_up_proj_bias", 48), ("down_proj_bias", 80)),
    is_transposed=True,
    is_interleaved=True,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_whole_record_has_the_bytes_of_the_codec(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {parameter: torch.randn(dims).to(dtype) for parameter, dims in SHAPE.module_shapes().items()}
    codec = CODECS[name]
    record = codec.encode(SHAPE, tensors)
    assert torch.equal(kernels.fast_encoding(codec).encode(SHAPE, tensors), record)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 63, -1])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_one_weight_that_is_not_finite_is_refused_by_name(name: str, place: int, value: float) -> None:
    tensors = {parameter: torch.ones(dims) for parameter, dims in SHAPE.module_shapes().items()}
    tensors["down_proj"].view(-1)[place] = value
    with pytest.raises(CheckpointError, match="down_proj has NaN or infinite weights"):
        kernels.fast_encoding(CODECS[name]).encode(SHAPE, tensors)
