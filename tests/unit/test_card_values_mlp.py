"""Gated MLPs of plain numbers on the card, executed on the CPU: products as the library's, the activation of 064."""

import numpy as np
import pytest
import torch

from offload_moe.native import kernels
from tests.support.cuda import shim
from tests.support.cuda.card import Card, aligned, bits, codec_name, copied
from tests.support.cuda.matrices import random_rows
from tests.support.kernels import make_linear
from tests.support.vector_arithmetic import exp

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

F = np.float32
# codec, hidden, intermediate, rows that are compiled: rows and columns that are no multiples of a block's
CASES = [("bf16", 96, 40, 1), ("bf16", 83, 21, 4), ("fp32", 48, 5, 2)]
COMPILED = [
    kernel
    for codec, hidden, inner, rows in CASES
    for kernel in (
        ("VALUES_FIRST", codec_name(codec), hidden, inner, rows, "OM_SILU"),
        ("VALUES_SECOND", codec_name(codec), inner, hidden, rows),
    )
]
STRIDE = 3


def products(linear: kernels.Linear, x: np.ndarray) -> np.ndarray:
    out = torch.empty(len(x), linear.shape.matrices[0].out_features)
    kernels.LinearKernel(linear.codec, [linear.shape], [linear.layout]).forward(torch.tensor(x), [linear.record], [out])
    return out.numpy()


def silu(gate: F) -> F:
    return F(gate / F(F(1) + exp(F(-gate))))


def run(
    case: tuple[str, int, int, int],
    linears: list[kernels.Linear],
    x: np.ndarray,
    shares: np.ndarray | None,
    *,
    seed: int = 0,
    is_stopped: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Activations ``[R, I]``, and ``[R, STRIDE, H]``, of which the second part is set."""
    codec, hidden, inner, compiled = case
    card = Card(COMPILED, len(x), seed=seed)
    card.stop[0] = int(is_stopped)
    planes = [copied(linear.record.view(torch.uint8).numpy()) for linear in linears]
    places = [{"codes": 0, "bias": -1, "rows": rows} for rows in (inner, inner, hidden)]
    given = aligned(compiled * hidden, np.float32)  # rows that are not there are read, and count nothing
    given[:] = np.nan
    given[: x.size] = x.reshape(-1)
    between = np.full((compiled, inner), 7.0, np.float32)
    first = {"x": given, "matrices": places[:2], "records": planes[:2], "hidden": between}
    card.run("VALUES_FIRST", (codec_name(codec), hidden, inner, compiled, "OM_SILU"), first)
    out = np.full((compiled, STRIDE, hidden), 5.0, np.float32)
    second = {"x": between, "matrix": places[2], "record": planes[2], "shares": shares}
    second |= {"out": out.ctypes.data + 4 * hidden, "stride": STRIDE}
    card.run("VALUES_SECOND", (codec_name(codec), inner, hidden, compiled), second)
    return between, out


@pytest.mark.parametrize("has_shares", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_products_are_the_librarys(case: tuple[str, int, int, int], has_shares: bool) -> None:
    codec, hidden, inner, compiled = case
    torch.manual_seed(hidden)
    linears = [make_linear(codec, rows, cols) for rows, cols in ((inner, hidden), (inner, hidden), (hidden, inner))]
    shares = random_rows(1, compiled)[0] if has_shares else None
    for num_rows in sorted({1, compiled}):
        x = random_rows(num_rows, hidden)
        gate, up = (products(linear, x) for linear in linears[:2])
        activations = np.array([[silu(value) for value in row] for row in gate], F) * up
        wanted = products(linears[2], activations)
        if shares is not None:
            wanted = wanted * shares[:num_rows, None]
        assert np.abs(wanted).max() > 0.01
        for seed in (0, 1, 5):
            between, out = run(case, linears, x, shares, seed=seed)
            assert np.array_equal(bits(between[:num_rows]), bits(activations))
            assert (between[num_rows:] == 7.0).all()
            assert np.array_equal(bits(out[:num_rows, 1]), bits(wanted))
            assert (out[:, [0, 2]] == 5.0).all()
            assert (out[num_rows:] == 5.0).all()


def test_nothing_is_written_once_the_pass_is_stopped() -> None:
    case = CASES[0]
    codec, hidden, inner, _ = case
    linears = [make_linear(codec, rows, cols) for rows, cols in ((inner, hidden), (inner, hidden), (hidden, inner))]
    between, out = run(case, linears, random_rows(1, hidden), None, is_stopped=True)
    assert (between == 7.0).all()
    assert (out == 5.0).all()
