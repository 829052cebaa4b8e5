"""Matrix products that depend on their operands alone.

A math library chooses a kernel by the number of rows, their layout, their alignment and the processor, and each
kernel adds in an order of its own: the same row times the same matrix can differ in its last bit between two calls.
Tests that compare bits with transformers take the library's choice away.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """``[..., M, K]`` and ``[..., K, N]`` -> ``[..., M, N]``, every sum over a contiguous run of K products in fp64."""
    products = left.double().unsqueeze(-2) * right.double().transpose(-1, -2).unsqueeze(-3)
    return products.contiguous().sum(-1).to(left.dtype)


def _mm_plus(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return bias * beta + _mm(left, right) * alpha


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return _mm(matrix, vector.unsqueeze(-1)).squeeze(-1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return _mv(left.unsqueeze(0), right).squeeze(0)


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _mm_plus,
    aten.baddbmm.default: _mm_plus,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
}


class _Products(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (product := PRODUCTS.get(func)) is not None:
            return product(*args, **(kwargs or {}))
        with self:  # what is composed of other operators, `linear` say, may hold products
            result = func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


@contextmanager
def products_of_operands_alone() -> Iterator[None]:
    """Meanwhile no product of this thread is the math library's."""
    with _Products():
        yield
