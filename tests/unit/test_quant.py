"""Codecs against bitsandbytes and against themselves."""

import bitsandbytes.functional as bnb
import pytest
import torch

from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.quant import CODECS, ExpertShape, Matrix, get_codec
from offload_moe.quant.nf4 import NF4_TABLE, dynamic_map

GATED = ExpertShape(
    matrices=(
        Matrix(name="gate_up_proj", out_features=48, in_features=80),
        Matrix(name="down_proj", out_features=80, in_features=24),
    )
)
GPT_OSS = ExpertShape(
    matrices=GATED.matrices,
    biases=(("gate_up_proj_bias", 48), ("down_proj_bias", 80)),
    is_transposed=True,
    is_interleaved=True,
)


def make_expert(shape: ExpertShape, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(dims).to(dtype) for name, dims in shape.module_shapes().items()}


@pytest.mark.parametrize("shape", [GATED, GPT_OSS], ids=["gated", "gpt_oss"])
@pytest.mark.parametrize(("codec", "tolerance"), [("nf4", 0.12), ("int8", 0.006), ("bf16", 0.0)])
def test_decode_returns_the_module_layout(codec: str, tolerance: float, shape: ExpertShape) -> None:
    expert = make_expert(shape)
    record = get_codec(codec).encode(shape, expert)
    assert record.numel() % 4096 == 0
    decoded = get_codec(codec).decode(shape, record, torch.float32)
    assert decoded.keys() == expert.keys()
    for name, value in expert.items():
        error = (decoded[name] - value.float()).norm() / value.float().norm()
        assert error <= (0.0 if name.endswith("bias") else tolerance), name


def test_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(NF4_TABLE), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_decodes_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    rows = torch.randn(96, 192).to(dtype)
    codec = get_codec("nf4")
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=96, in_features=192),))
    packed, state = bnb.quantize_4bit(rows, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = torch.float32
    ours = codec.decode(shape, codec.encode(shape, {"weight": rows}), torch.float32)["weight"]
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


def test_kernel_rows_put_gate_before_up() -> None:
    interleaved = torch.arange(8.0)[None, :].expand(3, 8)  # [in, out], out alternates gate, up
    shape = ExpertShape(
        matrices=(Matrix(name="gate_up_proj", out_features=8, in_features=3),), is_transposed=True, is_interleaved=True
    )
    rows = shape.to_kernel_rows("gate_up_proj", interleaved)
    assert rows[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(shape.to_module_layout("gate_up_proj", rows), interleaved)


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_nan_weights_are_refused_by_name(codec: str) -> None:
    expert = make_expert(GATED)
    expert["down_proj"][3, 3] = float("nan")
    with pytest.raises(CheckpointError, match="down_proj"):
        get_codec(codec).encode(GATED, expert)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_zero_experts_decode_to_zero(codec: str) -> None:
    zeros = {name: torch.zeros(dims) for name, dims in GATED.module_shapes().items()}
    decoded = get_codec(codec).decode(GATED, get_codec(codec).encode(GATED, zeros), torch.float32)
    assert all(not value.any() for value in decoded.values())


def test_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="nf4, int8, bf16"):
        get_codec("q4_0")
