"""The card's linears, executed on the CPU: the library's bits for every codec, number of rows and order of threads."""

import numpy as np
import pytest
import torch

from offload_moe.native import kernels
from offload_moe.native.planes import matrix_struct
from offload_moe.quant.layout import pack_planes, weight_shape
from tests.support.cuda import shim
from tests.support.cuda.card import Card, aligned, bits, codec_name, copied, matrix
from tests.support.cuda.linears import expected_of, make_matrices, multiply
from tests.support.cuda.matrices import extreme_rows, make_records, random_rows, spoil_scales
from tests.support.kernels import make_linear

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

# codec, rows of each matrix, columns, rows of activations: whole and broken panels, groups of panels that end early,
# odd numbers of blocks, nested scales that change inside a panel, more segments than are multiplied at a time.
CASES = [
    ("nf4", (40, 16, 24), 200, 1),
    ("nf4", (112, 16), 320, 4),
    ("nf4", (33, 144), 832, 8),
    ("int8", (48, 21), 192, 1),
    ("int8", (16, 7), 832, 8),
    ("mxfp4", (48, 21), 160, 1),
    ("mxfp4", (32, 5), 320, 4),
    ("gguf:Q4_K", (40, 16), 2304, 1),  # threads that have no superblock
    ("gguf:Q4_K", (21, 3), 256, 8),
    ("gguf:Q6_K", (48, 21), 256, 1),
    ("gguf:Q6_K", (16, 7), 768, 4),
    ("gguf:Q8_0", (16, 7), 320, 8),
    ("gguf:MXFP4", (48, 21), 192, 1),
    ("gguf:MXFP4", (32, 5), 320, 4),
    # threads that have no segment, in groups of four panels and of one
    ("int8", (20,), 1088, 1),
    ("nf4", (32,), 4160, 2),
]
VALUES = [
    ("bf16", (40, 16), 200, 1),
    ("bf16", (21, 3), 83, 4),
    ("fp32", (17,), 112, 2),
    ("fp32", (5, 16), 48, 8),
    ("fp32", (5,), 64, 8),
]
COMPILED = [("LINEAR", codec_name(codec), cols, rows) for codec, _, cols, rows in CASES]
COMPILED += [("VALUES", codec_name(codec), cols, rows) for codec, _, cols, rows in VALUES]
COMPILED += [("QUANTIZE", cols) for cols in sorted({cols for _, _, cols, _ in CASES})]


@pytest.mark.parametrize(("codec", "rows", "cols", "compiled"), CASES)
def test_bits_are_the_librarys(codec: str, rows: tuple[int, ...], cols: int, compiled: int) -> None:
    records, biases = make_matrices(codec, rows, cols)
    for num_rows in sorted({1, compiled - 1, compiled} - {0}):
        x = random_rows(num_rows, cols)
        expected = expected_of(records, x, biases)
        assert all(np.abs(out).max() > 0.1 for out in expected)
        for seed in (0, 1, 5):
            outs = multiply(Card(COMPILED, num_rows, seed=seed), records, x, compiled, biases)
            for out, wanted in zip(outs, expected, strict=True):
                assert np.array_equal(bits(out[:num_rows]), bits(wanted))
                assert (out[num_rows:] == 5.0).all()


@pytest.mark.parametrize(
    ("codec", "rows", "cols", "compiled"),
    [case for case in CASES if case[3] == 8 or case[0] in ("mxfp4", "gguf:Q6_K", "gguf:MXFP4")],
)
def test_extreme_groups_and_scales(codec: str, rows: tuple[int, ...], cols: int, compiled: int) -> None:
    records, biases = make_matrices(codec, rows, cols)
    for each in records:
        spoil_scales(each, "weight")
    x = extreme_rows(compiled, cols)
    expected = expected_of(records, x, biases)
    outs = multiply(Card(COMPILED, compiled), records, x, compiled, biases)
    for out, wanted in zip(outs, expected, strict=True):
        assert np.isnan(wanted).any()
        assert np.isfinite(wanted).any()
        assert np.array_equal(bits(out), bits(wanted))


@pytest.mark.parametrize(("codec", "rows", "cols", "compiled"), VALUES)
def test_plain_numbers(codec: str, rows: tuple[int, ...], cols: int, compiled: int) -> None:
    torch.manual_seed(cols)
    linears = [make_linear(codec, count, cols) for count in rows]
    biases = [None, *(random_rows(1, count)[0] for count in rows[1:])]
    for num_rows in (1, compiled):
        x = random_rows(num_rows, cols)
        kernel = kernels.LinearKernel(codec, [each.shape for each in linears], [each.layout for each in linears])
        expected = [torch.empty(num_rows, count) for count in rows]
        kernel.forward(torch.from_numpy(x), [each.record for each in linears], expected)
        places = [{"codes": 0, "bias": -1, "rows": count} for count in rows]
        planes = [copied(each.record.view(torch.uint8).numpy()) for each in linears]
        for seed in (0, 1, 5):
            outs = [np.full((compiled, count), 5.0, np.float32) for count in rows]
            memory = aligned(compiled * cols, np.float32)  # rows that are not there are read, and count nothing
            memory[:] = np.nan
            memory[: x.size] = x.reshape(-1)
            params = {"x": memory, "matrices": places, "records": planes, "biases": biases, "outs": outs}
            params["num_matrices"] = len(rows)
            Card(COMPILED, num_rows, seed=seed).run("VALUES", (codec_name(codec), cols, compiled), params, rows=rows)
            for out, wanted, bias in zip(outs, expected, biases, strict=True):
                total = wanted.numpy() if bias is None else wanted.numpy() + bias
                assert np.array_equal(bits(out[:num_rows]), bits(total))
                assert (out[num_rows:] == 5.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases_in_records_of_plain_numbers(dtype: torch.dtype) -> None:
    codec, (count, _), cols, _ = VALUES[0]
    layout = pack_planes([("weight.values", torch.bfloat16, (count, cols)), ("bias.values", dtype, (count,))])
    record, x = torch.zeros(layout.num_bytes, dtype=torch.uint8), random_rows(1, cols)
    layout.view(record, "weight.values")[:] = torch.from_numpy(random_rows(count, cols))
    layout.view(record, "bias.values")[:] = torch.from_numpy(random_rows(1, count)[0])
    kernel, expected = kernels.LinearKernel(codec, [weight_shape(count, cols)], [layout]), torch.empty(1, count)
    kernel.forward(torch.from_numpy(x), [record], [expected])
    place = matrix(matrix_struct(codec, weight_shape(count, cols).matrices[0], layout))
    out = np.empty((1, count), np.float32)
    params = {
        "x": copied(x),
        "matrices": [place],
        "records": [copied(record.numpy())],
        "outs": [out],
        "num_matrices": 1,
    }
    Card(COMPILED, 1).run("VALUES", (codec_name(codec), cols, 1), params, rows=[count])
    assert np.array_equal(bits(out), bits(expected.numpy()))


@pytest.mark.parametrize("cols", [48, 64])
def test_products_below_the_least_number_add_up_to_a_positive_zero(cols: int) -> None:
    """Whole lanes add up to -0; lanes with columns behind the last one do not."""
    x, weight = np.full((8, cols), 1e-30, np.float32), torch.full((5, cols), -1e-30)
    linear = kernels.Linear.of_numbers(weight)
    expected = torch.empty(8, 5)
    kernel = kernels.LinearKernel("fp32", [linear.shape], [linear.layout])
    kernel.forward(torch.from_numpy(x), [linear.record], [expected])
    out = np.full((8, 5), 5.0, np.float32)
    params = {"x": copied(x), "matrices": [{"codes": 0, "bias": -1, "rows": 5}], "records": [copied(weight.numpy())]}
    Card(COMPILED, 8).run("VALUES", ("OM_FP32", cols, 8), {**params, "outs": [out], "num_matrices": 1}, rows=[5])
    assert np.array_equal(bits(out), bits(expected.numpy()))
    assert not np.signbit(out).any()


@pytest.mark.parametrize("kind", ["QUANTIZE", "LINEAR", "VALUES"])
def test_nothing_is_written_once_the_pass_is_stopped(kind: str) -> None:
    (codec, rows, cols, compiled), (number_codec, _, number_cols, _) = CASES[0], VALUES[0]
    card, outs = Card(COMPILED, 1), [np.full(40, 5.0, np.float32)]
    card.stop[0] = 1
    taken = card.input(codec, cols, 1)
    x, plane = copied(random_rows(1, number_cols)), copied(random_rows(40, number_cols))
    params = {"x": x, "outs": outs, "num_matrices": 1}
    if kind == "QUANTIZE":
        card.run(kind, (cols,), {"x": x, "inputs": [taken]})
    elif kind == "LINEAR":
        record = make_records(codec, [("weight", 40, cols)])
        places = {"matrices": [record.matrix(0)], "records": record.memory, "input": taken}
        card.run(kind, (codec_name(codec), cols, compiled), {**params, **places}, rows=rows[:1])
    else:
        places = {"matrices": [{"codes": 0, "bias": -1, "rows": 40}], "records": [plane]}
        card.run(kind, (codec_name(number_codec), number_cols, 1), {**params, **places}, rows=[40])
    assert (outs[0] == 5.0).all()
    assert (taken["quants"] == 77).all()
