"""Random matrices and experts in panels, for the library's kernels and for the card's; inputs with extreme groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload_moe.native import kernels
from offload_moe.native.planes import record_structs
from offload_moe.quant import ExpertShape, Matrix, RecordLayout, get_codec
from offload_moe.quant.gguf import GgufCodec
from tests.support.cuda.card import copied, matrix
from tests.support.gguf_records import random_rows as random_blocks
from tests.support.gguf_records import spoil_blocks

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

    def matrices(self) -> list[dict[str, int]]:
        """The matrices of a record, for kernels' parameters; of GGUF's types gate and up apart."""
        parts = [self.num_parts, *([1] * (len(self.shape.matrices) - 1))]
        return [matrix(struct) for struct in record_structs(self.codec, self.shape, self.layout, parts)]

    def matrix(self, index: int) -> dict[str, int]:
        """One of them."""
        return self.matrices()[index]


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
    for number in range(count):
        if isinstance(coder, GgufCodec):
            memory.append(copied(_gguf_record(coder, shape, order, [seed, number])))
            continue
        values = {name: torch.randn(dims, generator=random) * 0.08 for name, dims in shape.module_shapes().items()}
        for name, _, _ in sizes:
            values[name] *= torch.exp(torch.randn(len(values[name]), 1, generator=random))
        record = coder.encode(shape, values)[: layout.num_bytes].clone()
        order.to_panels(record)
        memory.append(copied(record.numpy()))
    return Records(codec=codec, shape=shape, layout=layout, memory=memory, num_parts=num_parts)


def _gguf_record(codec: GgufCodec, shape: ExpertShape, order: kernels.PanelOrder, seed: list[int]) -> np.ndarray:
    """Random blocks, in panels."""
    values = {
        part.plane: torch.from_numpy(random_blocks(part.kind.name, part.num_rows, part.matrix.in_features, [*seed, n]))
        for n, part in enumerate(codec.parts(shape))
    }
    values |= {name: torch.linspace(-1, 1, length) for name, length in shape.biases}
    record = codec.encode(shape, values)[: codec.layout(shape).num_bytes].clone()
    order.to_panels(record)
    return record.numpy()


def _bias_name(name: str) -> str:
    return "bias" if name == "weight" else f"{name}_bias"


def spoil_scales(records: Records, matrix_name: str) -> None:
    """Zero, tiny, infinite and NaN scales among the matrix' scales, as far as the codec has them."""
    coder = get_codec(records.codec)
    for record in records.tensors:
        if isinstance(coder, GgufCodec):
            _spoil_blocks(coder, records, record, matrix_name)
        elif records.codec == "mxfp4":
            scales = records.layout.view(record, f"{matrix_name}.scales").flatten()
            scales[:5] = torch.tensor([0, 255, 1, 254, 0], dtype=torch.uint8)
        elif records.codec == "int8":
            scales = records.layout.view(record, f"{matrix_name}.scales").flatten()
            scales[[0, 3, 5, 9]] = torch.tensor(EXTREME_SCALES)
        else:
            nested = records.layout.view(record, f"{matrix_name}.absmax_scale").flatten()
            count = min(len(nested) - 1, len(EXTREME_SCALES))  # the first one stays
            nested[len(nested) - count :] = torch.tensor(EXTREME_SCALES)[len(EXTREME_SCALES) - count :]


def _spoil_blocks(codec: GgufCodec, records: Records, record: Tensor, matrix_name: str) -> None:
    """Every third block's scales, in turn."""
    order = kernels.panel_order(records.codec, records.shape)
    assert order is not None
    order.to_rows(record)
    for part in codec.parts(records.shape):
        if part.matrix.name == matrix_name:
            spoil_blocks(part.kind.name, records.layout.view(record, part.plane).numpy())
    order.to_panels(record)


def random_rows(num_rows: int, cols: int, *, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng([seed, num_rows, cols])
    return (random.standard_normal((num_rows, cols)) * np.exp(random.standard_normal((num_rows, 1)))).astype(np.float32)


def extreme_rows(num_rows: int, cols: int) -> np.ndarray:
    """Rows with a group of zeros, of tiny, subnormal, huge, infinite and NaN numbers, each where there is room."""
    x = random_rows(num_rows, cols)
    for row, value in zip(x, (0.0, 2.0**-101, 2.0**-100, 1e-42, 1e33, np.inf, -np.nan, -np.inf), strict=False):
        row[64 : min(cols, 128)] = value
    return x
