"""The common part of the quantizing codecs: kernel layout, padding, bias planes.

A quantizing codec only defines the encoding of one padded matrix ``[O, P]`` into planes, and its inverse.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.quant.layout import ExpertShape, Matrix, RecordLayout, pack_planes, round_up

IN_ALIGNMENT = 64  # a multiple of every codec's block length, so a block never crosses a row

PlaneSpec = tuple[str, torch.dtype, tuple[int, ...]]


class BlockwiseCodec(ABC):
    """Matrices quantized in blocks along padded rows; biases kept in fp32 beside them."""

    name: str

    def layout(self, shape: ExpertShape) -> RecordLayout:
        specs: list[PlaneSpec] = []
        biases = dict(shape.biases)
        for matrix in shape.matrices:
            planes = self.matrix_planes(matrix.out_features, round_up(matrix.in_features, IN_ALIGNMENT))
            specs += [(f"{matrix.name}.{plane}", dtype, dims) for plane, dtype, dims in planes]
            if length := biases.get(bias_of(matrix)):
                specs.append((f"{bias_of(matrix)}.values", torch.float32, (length,)))
        return pack_planes(specs)

    def encode(self, shape: ExpertShape, tensors: Mapping[str, Tensor]) -> Tensor:
        """As `Codec.encode`. Raises: CheckpointError for NaN or infinite weights."""
        layout = self.layout(shape)
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        for matrix in shape.matrices:
            planes = self.planes_of(shape, matrix, tensors)
            if not self.is_finite(planes):
                raise CheckpointError(f"{matrix.name} has NaN or infinite weights; {self.name} cannot encode them.")
            for plane, value in planes.items():
                layout.view(record, f"{matrix.name}.{plane}").copy_(value)
        for name, _ in shape.biases:
            layout.view(record, f"{name}.values").copy_(shape.to_kernel_rows(name, tensors[name]))
        return record

    def decode(self, shape: ExpertShape, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        layout = self.layout(shape)
        tensors: dict[str, Tensor] = {}
        for matrix in shape.matrices:
            prefix = f"{matrix.name}."
            planes = {p[len(prefix) :]: layout.view(record, p) for p in layout.planes if p.startswith(prefix)}
            rows = self.decode_matrix(planes)[:, : matrix.in_features].to(dtype)
            tensors[matrix.name] = shape.to_module_layout(matrix.name, rows)
        for name, _ in shape.biases:
            tensors[name] = shape.to_module_layout(name, layout.view(record, f"{name}.values").to(dtype))
        return tensors

    def planes_of(self, shape: ExpertShape, matrix: Matrix, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The planes of one matrix of an expert."""
        return self.encode_rows(matrix, shape.to_kernel_rows(matrix.name, tensors[matrix.name]))

    def encode_rows(self, matrix: Matrix, rows: Tensor) -> dict[str, Tensor]:
        """The planes of rows ``[o, K]`` of a matrix, padded or not."""
        return self.encode_matrix(pad_rows(rows))

    @abstractmethod
    def is_finite(self, planes: Mapping[str, Tensor]) -> bool:
        """Whether every weight was finite: other weights make their scales NaN."""

    @abstractmethod
    def matrix_planes(self, out_features: int, padded_in: int) -> list[PlaneSpec]:
        """Planes of one matrix ``[O, P]``, in record order."""

    @abstractmethod
    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        """``[O, P]`` of any floating dtype -> planes."""

    def rows_together(self, padded_in: int) -> int:
        """A piece of a matrix ``[O, P]`` is encoded as it is in the whole one if its rows are a multiple of this."""
        return 1

    def kept_of_piece(self, rows: Tensor, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `joined` needs of a piece ``[o, P]`` and its planes; codes are complete."""
        return {name: plane for name, plane in planes.items() if name != "codes"}

    def joined(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The planes of a whole matrix but its codes. kept: of its pieces, one after the other."""
        return dict(kept)

    @abstractmethod
    def decode_matrix(self, planes: Mapping[str, Tensor]) -> Tensor:
        """Planes -> fp32 ``[O, P]``."""


def pad_rows(rows: Tensor) -> Tensor:
    """``[O, K] -> [O, P]``, in a dtype that codecs accept."""
    rows = rows.float() if rows.dtype == torch.float64 else rows
    padding = round_up(rows.shape[1], IN_ALIGNMENT) - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, padding)) if padding else rows


def bias_of(matrix: Matrix) -> str:
    """The bias parameter that belongs to a matrix: `down_proj` -> `down_proj_bias`, `weight` -> `bias`."""
    return "bias" if matrix.name == "weight" else f"{matrix.name}_bias"
