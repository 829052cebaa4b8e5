"""Scales of least squared error: less error in bytes that bitsandbytes decodes, the same ones from every kernel set."""

import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.native import kernels
from offload_moe.native.feedback import Feedback, feed_back, feedback_of
from offload_moe.quant import CODECS, LEAST_ERROR, ExpertShape, Matrix, get_codec
from offload_moe.quant.blockwise import BlockwiseCodec
from offload_moe.quant.int8 import Int8Codec
from offload_moe.quant.nf4 import NF4_TABLE, Nf4Codec, block_absmax
from offload_moe.quant.pieces import encode_pieces
from tests.support.kernels import PANEL_SETS

SEED = torch.Generator().manual_seed(0)
GAUSSIAN = torch.randn(256, 512, generator=SEED)
HEAVY = torch.randn(256, 512, generator=SEED) / torch.rand(256, 512, generator=SEED).clamp(0.05).sqrt()
ODD = {
    "zero": torch.zeros(8, 256),
    "constant": torch.full((8, 256), -0.3),
    "subnormal": GAUSSIAN[:8, :256] * 1e-40,
    "huge": GAUSSIAN[:8, :256] * 1e37,
    "one outlier": torch.cat([torch.full((1, 64), 1e-3), torch.full((1, 64), 100.0)], dim=1),
    "all scales": GAUSSIAN[:64, :256] * torch.logspace(-30, 3, 64)[:, None],
}


def relative(decoded: Tensor, values: Tensor) -> float:
    return float((decoded - values).norm() / values.norm())


@pytest.mark.parametrize(("values", "most"), [(GAUSSIAN, 0.0835), (HEAVY, 0.102)])
def test_nf4_has_less_error_than_by_the_greatest_magnitude(values: Tensor, most: float) -> None:
    codec = Nf4Codec()
    searched = relative(codec.decode_matrix(kernels.search_nf4(values)), values)
    absmax = relative(codec.decode_matrix(kernels.encode_nf4(values)), values)
    assert searched < most
    assert searched < 0.93 * absmax


def test_int8_has_less_error_than_by_the_greatest_magnitude() -> None:
    codec = Int8Codec()
    searched = relative(codec.decode_matrix(kernels.search_int8(GAUSSIAN)), GAUSSIAN)
    assert searched < 0.96 * relative(codec.decode_matrix(kernels.encode_int8(GAUSSIAN)), GAUSSIAN)


def test_hardly_any_scale_has_less_error() -> None:
    """Of a fine grid of scales with both signs, codes by the nearest level."""
    blocks = GAUSSIAN[:4].view(-1, 64)
    table = torch.tensor(NF4_TABLE)
    found = torch.inf * torch.ones(len(blocks))
    for fraction in torch.linspace(0.5, 1.5, 401):
        for sign in (1, -1):
            scales = sign * fraction * blocks.abs().amax(1, keepdim=True)
            levels = table[((blocks / scales)[..., None] - table).abs().argmin(-1)]
            found = torch.minimum(found, (blocks - scales * levels).square().sum(1))
    decoded = Nf4Codec().decode_matrix(kernels.search_nf4(GAUSSIAN[:4]))
    assert (decoded - GAUSSIAN[:4]).square().sum() < 1.02 * found.sum()


@pytest.mark.parametrize("case", [*ODD, "gaussian"])
def test_bitsandbytes_decodes_it(case: str) -> None:
    values = ODD.get(case, GAUSSIAN)
    planes = kernels.search_nf4(values)
    _, state = quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.absmax, state.state2.absmax = planes["absmax"], planes["absmax_scale"]
    state.offset = planes["absmax_offset"][0]
    theirs = dequantize_4bit(planes["codes"].view(-1, 1), state)
    ours = Nf4Codec().decode_matrix(planes)
    torch.testing.assert_close(theirs.view_as(ours), ours, rtol=1e-6, atol=0)
    assert ours.isfinite().all()


def test_scales_have_both_signs() -> None:
    """The levels of nf4 are not symmetric."""
    is_negative = block_absmax(kernels.search_nf4(GAUSSIAN)) < 0
    assert 0.4 < is_negative.float().mean() < 0.6


@pytest.mark.parametrize("case", ["zero", "constant"])
def test_blocks_without_error_stay_so(case: str) -> None:
    values = ODD[case]
    for codec, search in ((Nf4Codec(), kernels.search_nf4), (Int8Codec(), kernels.search_int8)):
        torch.testing.assert_close(codec.decode_matrix(search(values)), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("search", [kernels.search_nf4, kernels.search_int8])
def test_an_important_column_has_less_error(search: object) -> None:
    assert callable(search)
    importance = torch.ones(512)
    importance[64:72] = 1000.0
    codec = Nf4Codec() if search is kernels.search_nf4 else Int8Codec()
    plain, weighed = (codec.decode_matrix(search(GAUSSIAN, weights)) for weights in (None, importance))
    of_plain, of_weighed = ((decoded - GAUSSIAN).square().sum(0) for decoded in (plain, weighed))
    assert of_weighed[64:72].sum() < (0.7 if search is kernels.search_nf4 else 0.95) * of_plain[64:72].sum()


def correlated(num_columns: int, seed: int = 3) -> Tensor:
    """Inputs of which some go together and some are larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(800, num_columns // 4, generator=generator) @ torch.randn(
        num_columns // 4, num_columns, generator=generator
    )
    sizes = torch.rand(num_columns, generator=generator).mul(4).exp()
    return (mixed / 10 + torch.randn(800, num_columns, generator=generator)) * sizes


@pytest.mark.parametrize(("out_features", "in_features", "most"), [(64, 256, 0.8), (100, 200, 0.9), (3, 64, 0.99)])
def test_columns_take_up_the_errors_of_others(out_features: int, in_features: int, most: float) -> None:
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=out_features, in_features=in_features),))
    rows = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(4))
    inputs = correlated(in_features)
    products = inputs.T @ inputs / len(inputs)
    errors = []
    for moments in ({}, {"weight": products.diagonal()}, {"weight": products}):
        codec = kernels.fast_encoding(get_codec("nf4"), LEAST_ERROR, moments)
        decoded = get_codec("nf4").decode(shape, codec.encode(shape, {"weight": rows}), torch.float32)["weight"]
        errors.append(relative(inputs @ decoded.T, inputs @ rows.T))
    plain, weighed, fed_back = errors
    assert weighed < 0.97 * plain
    assert 0 < fed_back < most * weighed


def test_errors_of_inputs_that_are_independent_stay() -> None:
    """Then the codes are the nearest ones, as without feedback."""
    squares = torch.rand(256, generator=torch.Generator().manual_seed(5)) + 0.5
    codec = kernels.fast_encoding(get_codec("nf4"), LEAST_ERROR, {"weight": squares})
    fed_back = kernels.fast_encoding(get_codec("nf4"), LEAST_ERROR, {"weight": squares.diag()})
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=256, in_features=256),))
    tensors = {"weight": GAUSSIAN[:, :256].contiguous()}
    assert torch.equal(codec.encode(shape, tensors), fed_back.encode(shape, tensors))


@pytest.mark.parametrize("case", ["no inputs", "one input", "the same input", "indefinite", "of no inputs"])
def test_inputs_that_depend_on_each_other(case: str) -> None:
    products = torch.zeros(128, 128)
    if case == "indefinite":  # as rounding may leave it
        products[:] = 1.5
        products.diagonal().fill_(1.0)
    if case == "of no inputs":
        products[:] = 1e30
        products.diagonal().fill_(1e-8)
    if case == "one input":
        products[5, 5] = 1e4
    if case == "the same input":
        products[:] = 1.0
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=64, in_features=128),))
    codec = kernels.fast_encoding(get_codec("nf4"), LEAST_ERROR, {"weight": products})
    rows = GAUSSIAN[:64, :128].contiguous()
    decoded = get_codec("nf4").decode(shape, codec.encode(shape, {"weight": rows}), torch.float32)["weight"]
    assert 0 < relative(decoded, rows) < 0.2


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("moments", [torch.tensor([1.0, math.nan]), torch.full((64,), math.inf), torch.eye(2) / 0])
def test_moments_that_are_no_numbers_are_refused(name: str, moments: Tensor) -> None:
    with pytest.raises(CheckpointError, match="down_proj has inputs that are NaN or too large"):
        kernels.fast_encoding(get_codec(name), LEAST_ERROR, {"gate": torch.ones(4), "down_proj": moments})


def test_every_kernel_set_finds_the_same() -> None:
    chosen = kernels.instruction_set()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1))
    inputs = correlated(256)
    products = inputs.T @ inputs
    found = []
    try:
        for name in PANEL_SETS:
            kernels.select_instruction_set(name)
            for values in (GAUSSIAN, HEAVY.bfloat16()):
                planes = kernels.search_nf4(values, importance) | kernels.search_int8(values)
                rows = values[:, :256]
                fed_back = feed_back(rows.float(), kernels.search_nf4(rows), feedback_of(products, 256))
                planes["fed back"] = fed_back["codes"]
                found.append({plane: value.clone() for plane, value in planes.items()})
    finally:
        kernels.select_instruction_set(chosen)
    for number, planes in enumerate(found):
        for plane, value in planes.items():
            assert torch.equal(value, found[number % 2][plane]), plane


def test_rows_that_come_in_runs_share_one_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each matrix, whose bytes are those of the whole."""
    made: list[int] = []

    def counted(moments: Tensor, padded: int) -> Feedback:
        made.append(len(moments))
        return feedback_of(moments, padded)

    monkeypatch.setattr("offload_moe.native.codecs.feedback_of", counted)
    inputs = correlated(200)
    products = inputs.T @ inputs / len(inputs)
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=300, in_features=200),))
    rows = torch.randn(300, 200, generator=torch.Generator().manual_seed(7))
    codec = kernels.fast_encoding(get_codec("nf4"), LEAST_ERROR, {"weight": products})
    assert isinstance(codec, BlockwiseCodec)
    whole = codec.encode(shape, {"weight": rows})
    for piece_rows in (64, 77):
        assert torch.equal(torch.cat([*encode_pieces(codec, shape, rows.split(piece_rows))]), whole)
    assert made == [200]


def test_each_matrix_has_its_own_feedback() -> None:
    inputs = correlated(200)
    products = inputs.T @ inputs / len(inputs)
    moments = {"first": products, "last": products.flip(0, 1)}
    rows = torch.randn(8, 200, generator=torch.Generator().manual_seed(7))

    def planes(*names: str) -> dict[str, Tensor]:
        shape = ExpertShape(matrices=tuple(Matrix(name=name, out_features=8, in_features=200) for name in names))
        codec = kernels.fast_encoding(get_codec("nf4"), LEAST_ERROR, {name: moments[name] for name in names})
        layout, record = codec.layout(shape), codec.encode(shape, dict.fromkeys(names, rows))
        return {plane: layout.view(record, plane) for plane in layout.planes}

    together, alone = planes("first", "last"), planes("first") | planes("last")
    assert not torch.equal(alone["first.codes"], alone["last.codes"])
    for plane, value in alone.items():
        assert torch.equal(together[plane], value), plane


@pytest.mark.parametrize("in_features", [100, 64, 2880])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_pieces_are_the_bytes_of_the_whole(name: str, in_features: int) -> None:
    """256 blocks that share a nested scale end inside of rows and pieces; weighed or not."""
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=300, in_features=in_features),))
    rows = torch.randn(300, in_features, generator=torch.Generator().manual_seed(2))
    squares = torch.rand(in_features, generator=torch.Generator().manual_seed(6))
    codec = kernels.fast_encoding(get_codec(name), LEAST_ERROR, {"weight": squares} if in_features == 100 else {})
    assert isinstance(codec, BlockwiseCodec)
    whole = codec.encode(shape, {"weight": rows})
    for piece_rows in (1, 77, 300):
        assert torch.equal(torch.cat([*encode_pieces(codec, shape, rows.split(piece_rows))]), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=8, in_features=64),))
    rows = torch.ones(8, 64)
    rows[1, 5] = value
    with pytest.raises(CheckpointError, match=f"weight has NaN or infinite weights; {name} cannot encode them"):
        kernels.fast_encoding(CODECS[name], LEAST_ERROR).encode(shape, {"weight": rows})
