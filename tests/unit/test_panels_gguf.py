"""Panels of GGUF's types: near what `gguf` decodes, the definition's bits in every set, and back exactly."""

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native import kernels
from offload_moe.quant import ExpertShape, Matrix, get_codec
from offload_moe.quant.gguf import TYPES, gguf_codec
from tests.support import gguf_definition
from tests.support.gguf_records import PLAIN, QUANTIZED, GgufMatrix, columns_of, with_scales_of_one_half
from tests.support.kernels import PANEL_SETS
from tests.support.one_arithmetic import F, fma

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FAST_SETS = [name for name in PANEL_SETS if name != "portable"]


def random_x(num_tokens: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    spread = torch.exp(torch.randn(num_tokens, columns // 64, 1, generator=generator))
    return (torch.randn(num_tokens, columns // 64, 64, generator=generator) * spread).view(num_tokens, columns)


@pytest.mark.parametrize("kind", TYPES)
def test_a_product_is_that_of_the_decoded_weights(kind: str) -> None:
    """With the activations that the kernels quantize exactly: integers up to 127 times a power of two."""
    for columns in columns_of(kind):
        matrix = GgufMatrix(kind, 37, columns)
        generator = torch.Generator().manual_seed(columns)
        x = torch.randint(-127, 128, (2, columns), generator=generator).float()
        x.view(2, -1, 64)[:, :, 5] = 127.0
        x *= torch.exp2(torch.randint(-3, 4, (2, columns // 64), generator=generator)).repeat_interleave(64, dim=1)
        kernels.select_instruction_set("portable")
        weight = matrix.weight
        expected, size = x.double().numpy() @ weight.T, x.abs().double().numpy() @ np.abs(weight).T
        assert (np.abs(matrix.times(x).numpy() - expected) <= 2e-6 * size).all()
        assert (np.abs(expected) > 0).all()


@pytest.mark.parametrize("instruction_set", FAST_SETS)
@pytest.mark.parametrize("kind", TYPES)
def test_every_set_and_number_of_tokens_gives_the_same_bits(instruction_set: str, kind: str) -> None:
    for rows, columns in zip((16, 37, 80), columns_of(kind), strict=True):
        matrix, x = GgufMatrix(kind, rows, columns, has_bias=True), random_x(11, columns)
        panels = matrix.in_panels()
        kernels.select_instruction_set("portable")
        expected = matrix.times(x, panels)
        assert expected.isfinite().all()
        kernels.select_instruction_set(instruction_set)
        for num_tokens in (1, 2, 3, 4, 5, 8, 11):
            found = matrix.times(x[:num_tokens], panels)
            assert torch.equal(found, expected[:num_tokens]), (rows, columns, num_tokens)


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_largest_integers_are_summed_exactly(instruction_set: str, kind: str) -> None:
    """All codes and scales at their ends, against all quants at theirs."""
    matrix = GgufMatrix(kind, 16, TYPES[kind].columns)
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        matrix.raw = with_scales_of_one_half(kind, np.full_like(matrix.raw, byte))
        matrix.record = matrix.codec.encode(matrix.shape, {"weight.codes": torch.from_numpy(matrix.raw)})
        for sign in (127.0, -127.0):
            x = torch.full((1, TYPES[kind].columns), sign)
            kernels.select_instruction_set(instruction_set)
            expected = x.double().numpy() @ matrix.weight.T
            assert np.allclose(matrix.times(x).numpy(), expected, rtol=3e-7)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_bits_are_those_of_the_definition(kind: str) -> None:
    columns = 768 if TYPES[kind].columns == 256 else 192
    matrix, x = GgufMatrix(kind, 17, columns), random_x(1, columns)
    kernels.select_instruction_set("portable")
    found = matrix.times(x)[0].numpy()
    for row in (0, 9, 16):
        expected = gguf_definition.product(kind, matrix.raw[row], x[0].numpy())
        assert found[row].view(np.int32) == expected.view(np.int32)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_a_record_comes_back_exactly(kind: str, rows: int) -> None:
    matrix = GgufMatrix(kind, rows, columns_of(kind)[1], has_bias=True)
    order = kernels.PanelOrder(matrix.codec.name, matrix.shape, matrix.layout)
    repacked = matrix.record.clone()
    order.to_panels(repacked)
    assert torch.equal(repacked.sort().values, matrix.record.sort().values)  # the same bytes elsewhere
    assert not torch.equal(repacked, matrix.record) or (rows == 1 and kind in ("Q4_K", "IQ4_XS"))
    order.to_rows(repacked)
    assert torch.equal(repacked, matrix.record)


@pytest.mark.parametrize("kind", TYPES)
def test_a_record_decodes_to_what_its_bytes_mean(kind: str) -> None:
    """The second statement of the blocks is exact; the decode rounds a product or two to fp32."""
    matrix = GgufMatrix(kind, 5, 256)
    found = matrix.codec.decode(matrix.shape, matrix.record, torch.float32)["weight"].numpy()
    if kind in PLAIN:
        numbers = torch.from_numpy(matrix.raw.reshape(5, -1)).view(getattr(torch, DTYPES[kind])).float().numpy()
        assert np.array_equal(found, numbers)
        return
    for row in range(5):
        blocks = gguf_definition.blocks_of(kind, matrix.raw[row])
        size = np.concatenate([block.sizes() for block in blocks])
        assert (np.abs(found[row] - gguf_definition.weights(kind, matrix.raw[row])) <= 2e-7 * size).all()
    assert found.any()


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_exponents_of_mxfp4_at_both_ends(instruction_set: str) -> None:
    matrix = GgufMatrix("MXFP4", 16, 64)
    for row, exponent in enumerate((0, 1, 200, 255)):
        matrix.raw[row, [0, 17]] = exponent
    matrix.record = matrix.codec.encode(matrix.shape, {"weight.codes": torch.from_numpy(matrix.raw)})
    x = torch.full((1, 64), 127.0 * 2.0**20)
    kernels.select_instruction_set(instruction_set)
    out = matrix.times(x)[0]
    assert out[3].isnan()
    matrix.raw[3] = 0
    expected = (x.double().numpy() @ matrix.weight.T)[0]
    assert np.allclose(out.numpy()[[0, 1, 2]], expected[[0, 1, 2]], rtol=1e-6, atol=0)
    assert out[0] != 0


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("kinds", [("Q4_K", "Q8_0"), ("F16", "Q8_0", "BF16"), ("F32", "F16")])
def test_matrices_of_several_types_take_one_input(instruction_set: str, kinds: tuple[str, ...]) -> None:
    matrices = [GgufMatrix(kind, rows, 512) for kind, rows in zip(kinds, (32, 21, 70), strict=False)]
    x = random_x(3, 512)
    kernels.select_instruction_set(instruction_set)
    kernel = kernels.LinearKernel(
        [matrix.codec.name for matrix in matrices],
        [matrix.shape for matrix in matrices],
        [matrix.layout for matrix in matrices],
        num_parts=1,
    )
    outs = [torch.empty(3, len(matrix.raw)) for matrix in matrices]
    kernel.forward(x, [matrix.in_panels() for matrix in matrices], outs)
    for out, matrix in zip(outs, matrices, strict=True):
        assert torch.equal(out, matrix.times(x))


@pytest.mark.parametrize("kind", PLAIN)
def test_numbers_stay_in_rows_and_are_summed_in_32_lanes(kind: str) -> None:
    """Activations are not rounded; the bits are those of docs/decisions/064, rows of numbers, in exact arithmetic."""
    matrix, x = GgufMatrix(kind, 3, 70), torch.randn(1, 70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(matrix.in_panels(), matrix.record)
    kernels.select_instruction_set("portable")
    found, weight = matrix.times(x)[0].numpy(), matrix.weight.astype(np.float32)
    for row in range(3):
        lanes = [F(0)] * 32
        for column in range(70):
            lanes[column % 32] = fma(x[0, column].item(), weight[row, column], lanes[column % 32])
        for half in (16, 8, 4, 2, 1):
            lanes = [F(lanes[lane] + lanes[lane + half]) for lane in range(half)]
        assert found[row].view(np.int32) == lanes[0].view(np.int32)


MIXTURES = [
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q5_K", "Q3_K", "Q8_0"),
    ("Q8_0", "Q8_0", "MXFP4"),
    ("F16", "F16", "F16"),
    ("F32", "Q4_K", "F16"),
    ("Q4_K", "BF16", "Q8_0"),
]


@pytest.mark.parametrize("kinds", MIXTURES)
def test_an_expert_of_several_types(kinds: tuple[str, ...]) -> None:
    hidden, intermediate = 256, 320 if kinds[2] != "Q6_K" else 256
    shape = ExpertShape(
        matrices=(
            Matrix(name="gate_up_proj", out_features=2 * intermediate, in_features=hidden),
            Matrix(name="down_proj", out_features=hidden, in_features=intermediate),
        ),
        biases=(("gate_up_proj_bias", 2 * intermediate), ("down_proj_bias", hidden)),
    )
    codec = gguf_codec(kinds)
    layout = codec.layout(shape)
    sizes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    parts = [GgufMatrix(kind, *size) for kind, size in zip(kinds, sizes, strict=True)]
    tensors = {part.plane: torch.from_numpy(m.raw) for part, m in zip(codec.parts(shape), parts, strict=True)}
    biases = {name: torch.linspace(-1, 1, length) for name, length in shape.biases}
    record = codec.encode(shape, tensors | biases)
    decoded = codec.decode(shape, record, torch.float64)
    assert torch.equal(decoded["gate_up_proj"], torch.from_numpy(np.concatenate([m.weight for m in parts[:2]])))
    kernels.panel_order(codec.name, shape).to_panels(record)
    kernel = kernels.ExpertKernel(codec.name, shape, layout, activation="silu", in_panels=True)
    x, out = random_x(3, hidden) * 0.1, torch.empty(3, hidden)
    kernel.forward(x, [record], [0, 3], [0, 1, 2], [1.0, 0.5, 2.0], out)
    for name in PANEL_SETS:
        kernels.select_instruction_set(name)
        again = torch.empty(3, hidden)
        kernel.forward(x, [record], [0, 3], [0, 1, 2], [1.0, 0.5, 2.0], again)
        assert torch.equal(again, out), name
        kernel.forward(x[1:2], [record], [0, 1], [0], [0.5], again[:1])
        assert torch.equal(again[0], out[1]), name
    gate, up = (x.double() @ decoded["gate_up_proj"].T + biases["gate_up_proj_bias"].double()).chunk(2, dim=1)
    middle = torch.nn.functional.silu(gate) * up
    expected = middle @ decoded["down_proj"].T + biases["down_proj_bias"].double()
    expected *= torch.tensor([1.0, 0.5, 2.0])[:, None]
    assert (out - expected).norm() / expected.norm() < (1e-6 if set(kinds) <= set(PLAIN) else 0.02)


def test_a_name_gives_one_codec() -> None:
    assert get_codec("gguf:Q4_K,Q4_K,Q6_K") is gguf_codec(("Q4_K", "Q4_K", "Q6_K"))
    with pytest.raises(ConfigError, match=r"IQ2_XS has no kernel\. Those that have: Q4_0"):
        get_codec("gguf:IQ2_XS")


def test_rows_that_are_no_multiple_of_a_chunk_are_refused() -> None:
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=16, in_features=192),))
    with pytest.raises(ConfigError, match="rows of 192 weights in Q4_K"):
        gguf_codec(["Q4_K"]).layout(shape)
    assert "no multiple of 256" in (kernels.unsupported_reason("gguf:Q4_K", shape) or "")
