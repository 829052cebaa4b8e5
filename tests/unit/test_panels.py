"""Panels of 16 rows: every set gives the definition's bits, for any number of tokens, and records come back exactly."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native import kernels, library
from offload_moe.quant import ExpertShape, Matrix, RecordLayout, get_codec
from offload_moe.quant.nf4 import dynamic_map
from tests.support import one_arithmetic
from tests.support.kernels import PANEL_SETS, relative_error
from tests.support.one_arithmetic import Reference

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

CODECS = ("nf4", "int8", "mxfp4")
SHAPES = [(16, 64), (32, 200), (37, 320), (15, 128), (48, 1408), (16, 2880), (5, 70), (64, 768), (128, 257)]


def make_matrix(
    codec: str, rows: int, columns: int, has_bias: bool = False
) -> tuple[ExpertShape, RecordLayout, Tensor]:
    shape = ExpertShape(
        matrices=(Matrix(name="weight", out_features=rows, in_features=columns),),
        biases=(("bias", rows),) if has_bias else (),
    )
    generator = torch.Generator().manual_seed(rows * 31 + columns)
    tensors = {name: torch.randn(dims, generator=generator) * 0.05 for name, dims in shape.module_shapes().items()}
    tensors["weight"] *= torch.exp(torch.randn(rows, 1, generator=generator))
    coder = get_codec(codec)
    return shape, coder.layout(shape), coder.encode(shape, tensors)


def in_panels(codec: str, shape: ExpertShape, layout: RecordLayout, record: Tensor, num_parts: int = 1) -> Tensor:
    repacked = record.clone()
    kernels.PanelOrder(codec, shape, layout, has_gate=num_parts == 2).to_panels(repacked)
    return repacked


def multiply(
    codec: str, shape: ExpertShape, layout: RecordLayout, record: Tensor, x: Tensor, num_parts: int = 1
) -> Tensor:
    kernel = kernels.LinearKernel(codec, [shape], [layout], num_parts=num_parts)
    out = torch.full((len(x), shape.matrices[0].out_features), 7.0)
    kernel.forward(x, [record], [out])
    return out


def random_rows(num_tokens: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(num_tokens, columns, generator=generator) * torch.exp(
        torch.randn(num_tokens, 1, generator=generator)
    )


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("codec", CODECS)
def test_bits_are_those_of_the_definition(instruction_set: str, codec: str) -> None:
    for rows, columns in ((21, 200), (16, 192)):
        shape, layout, record = make_matrix(codec, rows, columns, has_bias=rows == 21)
        x = random_rows(2, columns)
        kernels.select_instruction_set(instruction_set)
        out = multiply(codec, shape, layout, in_panels(codec, shape, layout, record), x)
        expected = np.stack([Reference(codec, shape, layout, record).times(row.numpy()) for row in x])
        assert np.array_equal(out.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("instruction_set", [name for name in PANEL_SETS if name != "portable"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_set_and_number_of_tokens_gives_the_same_bits(
    instruction_set: str, codec: str, rows: int, columns: int
) -> None:
    shape, layout, record = make_matrix(codec, rows, columns, has_bias=True)
    panels, x = in_panels(codec, shape, layout, record), random_rows(11, columns)
    kernels.select_instruction_set("portable")
    expected = multiply(codec, shape, layout, panels, x)
    assert expected.isfinite().all()
    kernels.select_instruction_set(instruction_set)
    for num_tokens in (1, 2, 3, 4, 5, 8, 11):
        assert torch.equal(multiply(codec, shape, layout, panels, x[:num_tokens]), expected[:num_tokens])


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("codec", CODECS)
def test_results_are_near_the_decoded_weights(instruction_set: str, codec: str) -> None:
    shape, layout, record = make_matrix(codec, 64, 512)
    x = random_rows(3, 512)
    weight = get_codec(codec).decode(shape, record, torch.float32)["weight"].double()
    kernels.select_instruction_set(instruction_set)
    out = multiply(codec, shape, layout, in_panels(codec, shape, layout, record), x)
    assert relative_error(out, x.double() @ weight.T) < 0.012  # int8 activations, and for nf4 8-bit levels


@pytest.mark.parametrize("codec", CODECS)
def test_panels_begin_anew_with_the_up_rows(codec: str) -> None:
    shape, layout, record = make_matrix(codec, 2 * 37, 192)
    x = random_rows(2, 192)
    whole = multiply(codec, shape, layout, in_panels(codec, shape, layout, record), x)
    halves = in_panels(codec, shape, layout, record, num_parts=2)
    assert not torch.equal(halves, in_panels(codec, shape, layout, record))
    assert torch.equal(multiply(codec, shape, layout, halves, x, num_parts=2), whole)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_record_comes_back_exactly(codec: str, rows: int, columns: int) -> None:
    shape, layout, record = make_matrix(codec, rows, columns, has_bias=True)
    order = kernels.PanelOrder(codec, shape, layout, has_gate=rows % 2 == 0)
    repacked = record.clone()
    order.to_panels(repacked)
    assert torch.equal(repacked, record) == (rows == 1)
    assert torch.equal(repacked.sort().values, record.sort().values)  # the same bytes elsewhere
    order.to_rows(repacked)
    assert torch.equal(repacked, record)


def test_a_panel_holds_the_same_columns_of_its_rows_in_one_vector() -> None:
    shape, layout, record = make_matrix("nf4", 40, 200)
    panels = in_panels("nf4", shape, layout, record)
    rows = layout.view(record, "weight.codes").view(40, 4 * 8, 4)
    codes = layout.view(panels, "weight.codes").flatten()
    expected = [rows[first : first + 16].transpose(0, 1).flatten() for first in (0, 16, 32)]
    assert torch.equal(codes, torch.cat(expected))
    absmax = layout.view(record, "weight.absmax").view(40, 4)
    assert torch.equal(
        layout.view(panels, "weight.absmax"),
        torch.cat([absmax[first : first + 16].T.flatten() for first in (0, 16, 32)]),
    )


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("codec", CODECS)
def test_groups_of_extreme_activations(instruction_set: str, codec: str) -> None:
    shape, layout, record = make_matrix(codec, 16, 320)
    panels, reference = in_panels(codec, shape, layout, record), Reference(codec, shape, layout, record)
    x = random_rows(1, 320).repeat(7, 1)
    x[0, :64] = 0.0
    x[1, :64] = 2.0**-101  # counts as zero
    x[2, :64] = 2.0**-100  # does not
    x[3, 64:128] = 1e-42
    x[4, :64] = 1e33
    x[5, 100] = torch.inf
    x[6, 319] = -torch.nan
    kernels.select_instruction_set(instruction_set)
    out = multiply(codec, shape, layout, panels, x)
    for index in range(4):
        expected = reference.times(x[index].numpy())
        assert np.array_equal(out[index].numpy().view(np.int32), expected.view(np.int32))
    assert torch.equal(out[1], out[0])
    assert out[4].isfinite().all()
    assert out[5:].isnan().all()


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_scales_of_mxfp4_at_both_ends(instruction_set: str) -> None:
    shape, layout, record = make_matrix("mxfp4", 16, 64)
    scales = layout.view(record, "weight.scales").view(16, 2)
    scales[0] = 0  # 2^-127, a subnormal number
    scales[1] = 255  # NaN
    scales[2] = 254
    scales[3, 1] = 1
    x = random_rows(1, 64) * 1e-3
    kernels.select_instruction_set(instruction_set)
    out = multiply("mxfp4", shape, layout, in_panels("mxfp4", shape, layout, record), x)[0]
    expected = Reference("mxfp4", shape, layout, record).times(x[0].numpy())
    assert out[1].isnan()
    assert out[0] != 0
    assert np.array_equal(np.delete(out.numpy(), 1).view(np.int32), np.delete(expected, 1).view(np.int32))


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_int8_codes_of_minus_128(instruction_set: str) -> None:
    shape, layout, record = make_matrix("int8", 16, 64)
    layout.view(record, "weight.codes").fill_(-128)
    x = torch.full((1, 64), -1.0)
    kernels.select_instruction_set(instruction_set)
    out = multiply("int8", shape, layout, in_panels("int8", shape, layout, record), x)[0]
    assert np.array_equal(out.numpy(), Reference("int8", shape, layout, record).times(x[0].numpy()))


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_bits_do_not_depend_on_the_callers_treatment_of_subnormal_numbers(instruction_set: str) -> None:
    shape, layout, record = make_matrix("mxfp4", 64, 128)
    layout.view(record, "weight.scales").fill_(1)  # 2^-126
    panels, x = in_panels("mxfp4", shape, layout, record), random_rows(2, 128) * 1e-3
    kernels.select_instruction_set(instruction_set)
    reference = Reference("mxfp4", shape, layout, record)
    expected = torch.from_numpy(np.stack([reference.times(row.numpy()) for row in x]))
    assert (expected.abs() < 1e-38).all()
    assert expected.any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        for threads in (1, 2):
            kernels.set_threads(threads)
            out = multiply("mxfp4", shape, layout, panels, x)
            assert (torch.tensor([1e-39]) * 1.0 == 0).all()  # the caller's own setting is back
            assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
    finally:
        torch.set_flush_denormal(False)
        kernels.set_threads(1)


def test_what_has_no_panels_is_refused() -> None:
    shape, _, _ = make_matrix("nf4", 16, 64)
    with pytest.raises(ConfigError, match="rows in order"):
        kernels.PanelOrder("bf16", shape, get_codec("bf16").layout(shape))
    with pytest.raises(ConfigError, match="rows in order"):
        kernels.LinearKernel("bf16", [shape], [get_codec("bf16").layout(shape)], num_parts=1)


def test_the_formula_of_nested_scales_is_near_the_codecs_table() -> None:
    table = dynamic_map().numpy()
    formula = np.array([one_arithmetic.dynamic_map(code) for code in range(256)], np.float32)
    apart = np.abs(formula - table)
    assert (apart <= 2.8e-7 * np.abs(table)).all()
    assert (apart > 0).sum() == 176


@pytest.mark.skipif(shutil.which("objdump") is None or "avxvnni" not in PANEL_SETS, reason="disassembles AVX-VNNI")
def test_avx_vnni_has_its_own_encoding() -> None:
    """Processors that have AVX-VNNI without AVX-512 know the VEX form of vpdpbusd only."""
    command = ["objdump", "-d", "--no-show-raw-insn", library.load_library()._name]
    code = subprocess.run(command, capture_output=True, text=True, check=True)
    forms = [line for line in code.stdout.splitlines() if "vpdpbusd" in line and "ymm" in line]
    assert sum("{vex}" in line for line in forms) > 100
    assert sum("{vex}" not in line for line in forms) > 100  # the EVEX form of the same source
