"""Any size, any batch, any number of threads: kernels of rows and of panels stay near fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_moe.errors import ConfigError
from offload_moe.native import kernels
from tests.support.kernels import SETS, decoded, make_linear


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    num_tokens=st.integers(1, 20),
    threads=st.integers(1, 4),
    codec=st.sampled_from(["nf4", "int8", "bf16", "fp32"]),
    instruction_set=st.sampled_from(SETS or [""]),
)
def test_linear_of_any_size(
    rows: int, columns: int, num_tokens: int, threads: int, codec: str, instruction_set: str
) -> None:
    torch.manual_seed(rows * 1000 + columns)
    linear = make_linear(codec, rows, columns)
    weight = decoded(linear)
    x = torch.randn(num_tokens, columns)
    out = torch.empty(num_tokens, rows)
    before = kernels.num_threads()
    kernels.select_instruction_set(instruction_set)
    kernels.set_threads(threads)
    try:
        expected = x.double() @ weight.T
        # results may cancel: the errors are bounded by what was added up, that of int8 activations by the largest one
        size = x.double().abs() @ weight.T.abs()
        step = x.double().abs().amax(dim=1, keepdim=True) / 254 * weight.abs().sum(dim=1)
        in_rows, in_panels = (0, 1e-6 * size), (1, 0.03 * size + 1.1 * step)
        for num_parts, bound in [in_rows] if kernels.not_in_panels_reason(codec) else [in_rows, in_panels]:
            kernel = kernels.LinearKernel(codec, [linear.shape], [linear.layout], num_parts=num_parts)
            if num_parts:
                kernels.PanelOrder(codec, linear.shape, linear.layout).to_panels(linear.record)
            kernel.forward(x, [linear.record], [out])
            assert ((out - expected).abs() <= bound + 1e-12).all()
    finally:
        kernels.select_instruction_set(None)
        kernels.set_threads(before)


def test_threads_are_bounded() -> None:
    with pytest.raises(ConfigError, match="cannot use 0 threads"):
        kernels.set_threads(0)
