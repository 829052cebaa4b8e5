"""Panels in Python, operation for operation as docs/decisions/064-one-arithmetic.md defines them, in exact arithmetic.

fp32 operations are numpy's; an fma is computed in exact rationals and rounded once.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

from offload_moe.quant import ExpertShape, Matrix, RecordLayout
from tests.support.kernels import Experts

F = np.float32
LEVELS = {
    "nf4": (-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124),
    "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}
UNITS = {"nf4": F(1) / F(124.11404726855135), "mxfp4": F(0.5), "int8": F(1)}
STARTS = [0.0] + [float.fromhex(s) for s in (
    "-0x1.81e03cp-18", "-0x1.205bbap-14", "-0x1.85f070p-11", "-0x1.f9db22p-8", "-0x1.41eb86p-4", "-0x1.95fff8p-1", "1",
)]  # fmt: skip
STEPS = [float.fromhex(s) for s in (
    "0x1.27476ep-21", "0x1.2dfd68p-18", "0x1.797cbep-16", "0x1.d7dbf6p-14", "0x1.26e978p-11", "0x1.70a3d8p-9",
    "0x1.ccccc6p-7", "0",
)]  # fmt: skip


def fma(a: float, b: float, c: float) -> F:
    """a * b + c of finite fp32 numbers, rounded once to nearest, ties to even."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    return round_fraction(exact)


def round_fraction(exact: Fraction) -> F:
    """The nearest fp32 number: of the candidates around the doubly rounded one, the nearest, ties to the even."""
    guess = F(float(exact))
    candidates = (np.nextafter(guess, F(-np.inf)), guess, np.nextafter(guess, F(np.inf)))
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.int32)) & 1))


def dynamic_map(code: int) -> F:
    distance = abs(code - 127)
    piece = distance.bit_length() - 1 if distance else 0
    size = fma(STEPS[piece], distance, STARTS[piece])
    return -size if code < 127 else size


def quantize(values: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 ``[K]``, K a multiple of `group` -> quants ``[K / group, group]``, scales ``[K / group]``."""
    blocks = values.astype(F).reshape(-1, group)
    quants, scales = np.zeros(blocks.shape, np.int64), np.zeros(len(blocks), F)
    for index, block in enumerate(blocks):
        most = (block.view(np.uint32) & 0x7FFFFFFF).max()
        if most >= 0x7F800000:
            scales[index] = np.nan
        elif most >= 0x0D800000:
            size = np.uint32(most).view(F)
            quants[index] = np.rint(block * (F(127) / size)).astype(np.int64)
            scales[index] = size / F(127)
    return quants, scales


class Reference:
    """One matrix of a record in row order, and its product with a row of activations."""

    def __init__(self, codec: str, shape: ExpertShape, layout: RecordLayout, record: torch.Tensor) -> None:
        (matrix,) = shape.matrices
        self.codec, self.rows, self.columns = codec, matrix.out_features, matrix.in_features
        self.blocks = -(-self.columns // 64)
        self.group = 32 if codec == "mxfp4" else 64
        planes = {name.removeprefix("weight."): layout.view(record, name).numpy() for name in layout.planes}
        self._planes = planes
        codes = planes["codes"]
        if codec == "int8":
            self._levels = codes.astype(np.int64)
        else:
            first, second = (codes >> 4, codes & 15) if codec == "nf4" else (codes & 15, codes >> 4)
            self._levels = np.array(LEVELS[codec])[np.stack([first, second], -1).reshape(self.rows, -1)]
        self._levels = self._levels.reshape(self.rows, -1, self.group)
        self.bias = planes.get("bias.values")

    def scale(self, row: int, group: int) -> F:
        at = row * self._levels.shape[1] + group
        if self.codec == "int8":
            return F(self._planes["scales"][at])
        if self.codec == "mxfp4":
            byte = int(self._planes["scales"][at])
            return F(np.nan) if byte == 255 else F(2.0 ** (byte - 127))
        nested = float(self._planes["absmax_scale"][at // 256])
        return fma(dynamic_map(int(self._planes["absmax"][at])), nested, float(self._planes["absmax_offset"][0]))

    def times(self, x: np.ndarray, rows: list[int] | None = None) -> np.ndarray:
        """fp32 ``[K]`` -> fp32 ``[len(rows)]``."""
        padded = np.zeros(self.blocks * 64, F)
        padded[: self.columns] = x
        quants, scales = quantize(padded, self.group)
        return np.array([self._row(row, quants, scales) for row in rows or range(self.rows)], F)

    def _row(self, row: int, quants: np.ndarray, scales: np.ndarray) -> F:
        total, per_segment = F(0), 2 * 64 // self.group
        for first in range(0, len(scales), per_segment):
            segment = F(0)
            for group in range(first, min(first + per_segment, len(scales))):
                value = F(int((self._levels[row, group] * quants[group]).sum()))
                scale = self.scale(row, group) * scales[group]
                if not np.isfinite(scale):
                    return F(np.nan)
                segment = value * scale if group == first else fma(value, scale, segment)
            total = total + segment
        result = total * UNITS[self.codec]
        return result if self.bias is None else result + F(self.bias[row])


def expert_of(experts: Experts, index: int, x: np.ndarray, activate: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """One expert's result for fp32 ``[H]``: gate and up, activation, down; its weight is not applied."""
    first, second = (_matrix(experts, index, matrix) for matrix in experts.shape.matrices)
    gate, up = np.split(first.times(x), 2)
    return second.times(activate(gate) * up)


def _matrix(experts: Experts, index: int, matrix: Matrix) -> Reference:
    """A matrix of a record as a record of its own."""
    planes = experts.layout.planes
    renamed = {
        name.replace(f"{matrix.name}.", "weight.").replace(f"{matrix.name}_bias", "bias"): plane
        for name, plane in planes.items()
        if name.startswith(matrix.name)
    }
    shape = ExpertShape(
        matrices=(Matrix(name="weight", out_features=matrix.out_features, in_features=matrix.in_features),)
    )
    return Reference(
        experts.codec, shape, RecordLayout(planes=renamed, num_bytes=experts.layout.num_bytes), experts.records[index]
    )
