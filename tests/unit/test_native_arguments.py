"""What native code would read or write beyond a tensor's memory is refused before it is called."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native import kernels
from offload_moe.quant import get_codec
from offload_moe.quant.layout import weight_shape
from tests.support.kernels import make_experts, make_linear, route

ROWS = torch.zeros(2, 128)
NO_ROWS = [
    torch.zeros(2, 64),
    torch.zeros(128),
    torch.zeros(2, 128, dtype=torch.float16),
    torch.zeros(128, 2).T,
    torch.zeros(2, 128, device="meta"),
]


@pytest.mark.parametrize("other", NO_ROWS, ids=["columns", "dims", "dtype", "order", "device"])
def test_tensors_that_are_no_rows(other: Tensor) -> None:
    experts, linear = make_experts("nf4", 128, 64), make_linear("nf4", 128, 128)
    layer = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu")
    product = kernels.LinearKernel("nf4", [linear.shape], [linear.layout])
    calls: list[Callable[[Tensor, Tensor], None]] = [
        lambda x, out: layer.forward(x, experts.records, *route(2, 4), out),
        lambda x, out: product.forward(x, [linear.record], [out]),
    ]
    for call in calls:
        for x, out in ((other, ROWS.clone()), (ROWS, other)):
            with pytest.raises(ConfigError, match=r"the kernels need contiguous|read host memory"):
                call(x, out)


@pytest.mark.parametrize(
    ("out", "accumulate", "rows", "said"),
    [
        (torch.zeros(2, 128).bfloat16(), True, None, "only fp32 accumulates"),
        (torch.zeros(1, 128), False, None, "only fp32 accumulates"),
        (torch.zeros(2, 128).bfloat16(), False, [0], "rows of out"),
        (torch.zeros(2, 128), False, [0, 1], "2 rows of out for 1 pairs"),
        (torch.zeros(2, 128), False, [2], "1 rows of out for 1 pairs, of 2"),
        (torch.zeros(2, 128), False, [-1], "1 rows of out for 1 pairs, of 2"),
    ],
)
def test_rows_of_experts_that_out_does_not_have(
    out: Tensor, accumulate: bool, rows: list[int] | None, said: str
) -> None:
    experts = make_experts("nf4", 128, 64, count=1)
    kernel = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu")
    with pytest.raises(ConfigError, match=said):
        kernel.forward(ROWS, experts.records, [0, 1], [0], [1.0], out, accumulate=accumulate, out_ids=rows)


def test_linears_of_one_call() -> None:
    linears = [make_linear("nf4", rows, 128) for rows in (70, 5)]
    kernel = kernels.LinearKernel("nf4", [each.shape for each in linears], [each.layout for each in linears])
    records = [each.record for each in linears]
    for outs in (
        [torch.zeros(2, 70), torch.zeros(2, 5).bfloat16()],
        [torch.zeros(2, 70), torch.zeros(1, 5)],
    ):
        with pytest.raises(ConfigError, match=r"torch\.float32, 2 rows expected"):
            kernel.forward(ROWS, records, outs)
    with pytest.raises(ConfigError, match="takes one token, not 2 into 1 rows"):
        kernel.forward_row(ROWS, records, torch.zeros(1, 75))
    shapes = [weight_shape(8, 128), weight_shape(8, 64)]
    with pytest.raises(ConfigError, match=r"read one input, not \[128, 64\] features"):
        kernels.LinearKernel("nf4", shapes, [get_codec("nf4").layout(shape) for shape in shapes])


def test_no_number_of_threads() -> None:
    for number in (0, -1, 10**6):
        with pytest.raises(ConfigError, match=f"cannot use {number} threads"):
            kernels.set_threads(number)
