"""What every codec promises, those of installed extensions included, and codecs against bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch

from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.native.kernels import PanelOrder, fast_encoding
from offload_moe.quant import Codec, ExpertShape, Matrix, codec_names, get_codec
from offload_moe.quant.mxfp4 import Mxfp4Codec, mxfp4_values
from offload_moe.quant.nf4 import NF4_TABLE, dynamic_map
from offload_moe.quant.pieces import encode_pieces

EXAMPLE = "int6"  # of examples/extension
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
@pytest.mark.parametrize(
    ("codec", "tolerance"), [("nf4", 0.12), ("int8", 0.006), ("bf16", 0.0), ("mxfp4", 0.15), (EXAMPLE, 0.026)]
)
@pytest.mark.usefixtures("example")
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


class TestContract:
    @pytest.fixture(params=(*codec_names(), EXAMPLE))
    def codec(self, request: pytest.FixtureRequest) -> Codec:
        if request.param == EXAMPLE:
            request.getfixturevalue("example")
        return get_codec(request.param)

    @pytest.mark.parametrize("shape", [GATED, GPT_OSS], ids=["gated", "gpt_oss"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_experts_come_back_in_their_own_layout(self, codec: Codec, shape: ExpertShape, dtype: torch.dtype) -> None:
        expert = make_expert(shape, dtype)
        record = codec.encode(shape, expert)
        assert (record.dtype, record.shape) == (torch.uint8, (codec.layout(shape).record_bytes,))
        before = record.clone()
        for chosen in (torch.float32, torch.bfloat16):
            decoded = codec.decode(shape, record, chosen)
            assert decoded.keys() == expert.keys()
            for name, value in decoded.items():
                assert (value.dtype, value.shape) == (chosen, expert[name].shape)
                assert (value.float() - expert[name].float()).norm() < 0.2 * expert[name].float().norm()
        assert torch.equal(record, before)
        assert torch.equal(codec.encode(shape, expert), before)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers_are_refused_by_name(self, codec: Codec, value: float) -> None:
        expert = make_expert(GATED)
        expert["down_proj"][3, 3] = value
        with pytest.raises(CheckpointError, match="down_proj"):
            codec.encode(GATED, expert)

    def test_zero_experts_decode_to_zero(self, codec: Codec) -> None:
        zeros = {name: torch.zeros(dims) for name, dims in GATED.module_shapes().items()}
        decoded = codec.decode(GATED, codec.encode(GATED, zeros), torch.float32)
        assert all(not value.any() for value in decoded.values())


def test_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="nf4, int8, bf16, mxfp4"):
        get_codec("q4_0")


def all_mxfp4(rows: int = 8, blocks: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes under scales that bf16 reaches; every code occurs."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (rows, blocks * 16), generator=generator, dtype=torch.uint8)
    return codes, torch.randint(10, 240, (rows, blocks), generator=generator, dtype=torch.uint8)


def test_mxfp4_decodes_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes, scales = all_mxfp4()
    assert len(torch.unique(torch.stack([codes & 15, codes >> 4]))) == 16
    theirs = convert_moe_packed_tensors(codes.view(1, 8, 6, 16), scales[None], dtype=torch.bfloat16)[0].T
    ours = mxfp4_values(codes, scales)
    assert torch.equal(ours.bfloat16(), theirs)
    assert torch.equal(ours.signbit(), theirs.signbit())


def test_mxfp4_scales_at_both_ends() -> None:
    codes = torch.full((1, 32), 0x2A, dtype=torch.uint8)  # -1 and 1
    values = mxfp4_values(codes, torch.tensor([[0, 254]], dtype=torch.uint8))[0]
    assert values[[0, 1, 32, 33]].tolist() == [-(2.0**-127), 2.0**-127, -(2.0**127), 2.0**127]


@pytest.mark.parametrize("shape", [GATED, GPT_OSS], ids=["gated", "gpt_oss"])
def test_mxfp4_keeps_numbers_that_came_from_it(shape: ExpertShape) -> None:
    expert = make_expert(shape)
    matrix = shape.matrices[0]
    rows = mxfp4_values(*all_mxfp4(matrix.out_features, 3))[:, : matrix.in_features]
    expert[matrix.name] = shape.to_module_layout(matrix.name, rows)
    decoded = get_codec("mxfp4").decode(shape, get_codec("mxfp4").encode(shape, expert), torch.float32)
    assert torch.equal(decoded[matrix.name], expert[matrix.name])


def test_mxfp4_rounds_to_the_nearest_and_ties_to_even() -> None:
    values = torch.zeros(1, 64)
    values[0, :17] = torch.tensor(
        [6.0, 0.25, 0.26, 0.74, 0.75, 1.25, 1.26, 1.75, 1.7, 2.5, 2.6, 3.5, 3.4, 5.0, 5.1, 7.9, -0.75]
    )
    planes = Mxfp4Codec().encode_matrix(values)
    expected = [6.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 1.5, 2.0, 3.0, 4.0, 3.0, 4.0, 6.0, 6.0, -1.0]
    assert Mxfp4Codec().decode_matrix(planes)[0, :17].tolist() == expected


@pytest.mark.parametrize("magnitude", [2.0**-126, 2.0**-149, 1e-30, 2.0**120])
def test_mxfp4_at_the_ends_of_the_range(magnitude: float) -> None:
    values = torch.full((1, 64), magnitude)
    assert torch.isfinite(Mxfp4Codec().decode_matrix(Mxfp4Codec().encode_matrix(values))).all()


@pytest.mark.parametrize("features", [64, 96])
def test_mxfp4_takes_blocks_and_scales_as_they_are(features: int) -> None:
    matrix = Matrix(name="gate_up_proj", out_features=6, in_features=features)
    shape = ExpertShape(matrices=(matrix,), is_transposed=True, is_interleaved=True)
    codes, scales = all_mxfp4(6, features // 32)
    codec = get_codec("mxfp4")
    record = codec.encode(shape, {"gate_up_proj_blocks": codes, "gate_up_proj_scales": scales})
    layout = codec.layout(shape)
    order = [0, 2, 4, 1, 3, 5]
    assert torch.equal(layout.view(record, "gate_up_proj.codes")[:, : features // 2], codes[order])
    assert torch.equal(layout.view(record, "gate_up_proj.scales").view(6, -1)[:, : features // 32], scales[order])
    values = mxfp4_values(codes, scales)
    assert torch.equal(codec.decode(shape, record, torch.float32)["gate_up_proj"], values.T)
    scales[3, 1] = 255
    with pytest.raises(CheckpointError, match="gate_up_proj has NaN"):
        codec.encode(shape, {"gate_up_proj_blocks": codes, "gate_up_proj_scales": scales})


@pytest.mark.parametrize("num_rows", [300, 5, 16])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_pieces_in_panels_are_the_bytes_of_the_whole(name: str, num_rows: int) -> None:
    """Pieces that cut through panels, and a last panel of fewer rows."""
    torch.manual_seed(0)
    matrix = Matrix(name="weight", out_features=num_rows, in_features=100)
    shape = ExpertShape(matrices=(matrix,), biases=(("bias", num_rows),))
    rows, bias = torch.randn(num_rows, 100), torch.randn(num_rows)
    codec = fast_encoding(get_codec(name))
    whole = codec.encode(shape, {"weight": rows, "bias": bias})
    PanelOrder(name, shape, codec.layout(shape)).to_panels(whole)
    for piece_rows in (1, 7, 16, 77, 300):
        pieces = encode_pieces(codec, shape, rows.split(piece_rows), bias, in_panels=True)
        assert torch.equal(torch.cat([*pieces]), whole)


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_pieces_are_the_bytes_of_the_whole(name: str, dtype: torch.dtype, has_bias: bool, is_native: bool) -> None:
    """Blocks of scales are cut through: 100 columns make two blocks a row, 256 of which share a nested scale."""
    torch.manual_seed(0)
    biases = (("bias", 300),) if has_bias else ()
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=300, in_features=100),), biases=biases)
    rows, bias = torch.randn(300, 100).to(dtype), torch.randn(300)
    codec = fast_encoding(get_codec(name)) if is_native else get_codec(name)
    whole = codec.encode(shape, {"weight": rows, "bias": bias})
    pieces = encode_pieces(codec, shape, rows.split(77), bias if has_bias else None)
    assert torch.equal(torch.cat([*pieces]), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_pieces_with_weights_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=8, in_features=64),))
    rows = torch.ones(8, 64)
    rows[1, 5] = value
    with pytest.raises(CheckpointError, match=f"weight has NaN or infinite weights; {name} cannot encode them"):
        list(encode_pieces(get_codec(name), shape, rows.split(3)))
