"""Random matrices and experts in panels, for the library's kernels and for the card's; inputs with extreme groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload_moe.native import kernels
from offload_moe.native.planes import matrix_struct
from offload_moe.quant import ExpertShape, Matrix, RecordLayout, get_codec
from tests.support.cuda.card import copied, matrix

EXTREME_SCALES = (0.0, 1e-42, torch.inf, torch.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Records of one shape in panels, at addresses that the card's kernels may read."""

    codec: str
    shape: ExpertShape
    layout: RecordLayout
    memory: list[np.ndarray]
    num_parts: int = 1

    @property
    def tensors(self) -> list[Tensor]:
        return [torch.from_numpy(memory) for memory in self.memory]

    def matrix(self, index: int) -> dict[str, int]:
        """One matrix of a record, for a kernel's parameters."""
        parts = self.num_parts if index == 0 else 1
        return matrix(matrix_struct(self.codec, self.shape.matrices[index], self.layout, num_parts=parts))


def make_records(
    codec: str,
    sizes: Sequence[tuple[str, int, int]],
    *,
    count: int = 1,
    num_parts: int = 1,
    has_bias: bool = False,
    seed: int = 0,
) -> Records:
    """sizes: name, rows and columns of each matrix. num_parts: of the first one."""
    shape = ExpertShape(
        matrices=tuple(Matrix(name=name, out_features=rows, in_features=cols) for name, rows, cols in sizes),
        biases=tuple((_bias_name(name), rows) for name, rows, _ in sizes) if has_bias else (),
    )
    random = torch.Generator().manual_seed(seed * 1009 + sizes[0][1] * 31 + sizes[0][2])
    coder, order = get_codec(codec), None
    layout, memory = coder.layout(shape), []
    order = kernels.PanelOrder(codec, shape, layout, has_gate=num_parts == 2)
    for _ in range(count):
        values = {name: torch.randn(dims, generator=random) * 0.08 for name, dims in shape.module_shapes().items()}
        for name, _, _ in sizes:
            values[name] *= torch.exp(torch.randn(len(values[name]), 1, generator=random))
        record = coder.encode(shape, values)[: layout.num_bytes].clone()
        order.to_panels(record)
        memory.append(copied(record.numpy()))
    return Records(codec=codec, shape=shape, layout=layout, memory=memory, num_parts=num_parts)


def _bias_name(name: str) -> str:
    return "bias" if name == "weight" else f"{name}_bias"


def spoil_scales(records: Records, matrix_name: str) -> None:
    """Zero, tiny, infinite and NaN scales among the matrix' scales, as far as the codec has them."""
    for record in records.tensors:
        if records.codec == "mxfp4":
            scales = records.layout.view(record, f"{matrix_name}.scales").flatten()
            scales[:5] = torch.tensor([0, 255, 1, 254, 0], dtype=torch.uint8)
        elif records.codec == "int8":
            scales = records.layout.view(record, f"{matrix_name}.scales").flatten()
            scales[[0, 3, 5, 9]] = torch.tensor(EXTREME_SCALES)
        else:
            nested = records.layout.view(record, f"{matrix_name}.absmax_scale").flatten()
            count = min(len(nested) - 1, len(EXTREME_SCALES))  # the first one stays
            nested[len(nested) - count :] = torch.tensor(EXTREME_SCALES)[len(EXTREME_SCALES) - count :]


def random_rows(num_rows: int, cols: int, *, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng([seed, num_rows, cols])
    return (random.standard_normal((num_rows, cols)) * np.exp(random.standard_normal((num_rows, 1)))).astype(np.float32)


def extreme_rows(num_rows: int, cols: int) -> np.ndarray:
    """Rows with a group of zeros, of tiny, subnormal, huge, infinite and NaN numbers, each where there is room."""
    x = random_rows(num_rows, cols)
    for row, value in zip(x, (0.0, 2.0**-101, 2.0**-100, 1e-42, 1e33, np.inf, -np.nan, -np.inf), strict=False):
        row[64 : min(cols, 128)] = value
    return x
