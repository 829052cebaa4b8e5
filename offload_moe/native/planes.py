"""Record layouts as the native kernels read them."""

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.constants import BF16_VALUES, BLOCK, CODECS, FP32_VALUES
from offload_moe.native.structs import MatrixStruct
from offload_moe.quant.layout import ExpertShape, Matrix, RecordLayout, round_up

VALUES = ("bf16", "fp32")  # no codes
DTYPES = {torch.float32: FP32_VALUES, torch.bfloat16: BF16_VALUES}
ABSENT = -1


def unsupported_reason(codec: str, shape: ExpertShape) -> str | None:
    """Why the kernels cannot compute experts of this shape, or None when they can."""
    if codec not in CODECS:
        return f"codec {codec} has no native kernel"
    if codec in VALUES and shape.is_transposed:
        return f"{codec} records keep the module's [in, out] matrices, the kernels read [out, in]"
    return None


def not_in_panels_reason(codec: str) -> str | None:
    """Why records of this codec have no panels, or None when they have."""
    return f"{codec} records keep their rows in order" if codec in VALUES else None


def matrix_struct(codec: str, matrix: Matrix, layout: RecordLayout, *, num_parts: int = 0) -> MatrixStruct:
    """Offsets and dimensions of one matrix of a record.

    num_parts: its rows are in panels, which begin anew with each part (gate and up rows are two); 0: in row order.
    """
    planes = _PLANES[codec]
    bias = "bias.values" if matrix.name == "weight" else f"{matrix.name}_bias.values"
    return MatrixStruct(
        rows=matrix.out_features,
        cols=matrix.in_features,
        padded=round_up(matrix.in_features, BLOCK),
        codec=CODECS[codec],
        part_rows=matrix.out_features // num_parts if num_parts else 0,
        bias=layout.planes[bias].offset if bias in layout.planes else ABSENT,
        bias_dtype=DTYPES[layout.planes[bias].dtype] if bias in layout.planes else 0,
        **{field: layout.planes[f"{matrix.name}.{plane}"].offset for field, plane in planes.items()},
        **{field: ABSENT for field in _OPTIONAL_FIELDS if field not in planes},
    )


def check_rows(name: str, value: Tensor, columns: int) -> None:
    """Check that a tensor is a contiguous CPU matrix of fp32 or bf16 with these columns. Raises: ConfigError."""
    if value.dtype not in DTYPES or value.dim() != 2 or value.shape[1] != columns or not value.is_contiguous():
        raise ConfigError(
            f"{name} is {value.dtype} {tuple(value.shape)}; the kernels need contiguous fp32 or bf16 [T, {columns}]."
        )
    if value.device.type != "cpu":
        raise ConfigError(f"{name} is on {value.device}; the native kernels read host memory.")


def address_of(record: Tensor | int) -> int:
    """The address of a record, which may be given as one."""
    return record if isinstance(record, int) else record.data_ptr()


_PLANES = {
    "nf4": {
        "codes": "codes",
        "scales": "absmax",
        "nested_scales": "absmax_scale",
        "nested_offset": "absmax_offset",
    },
    "int8": {"codes": "codes", "scales": "scales"},
    "mxfp4": {"codes": "codes", "scales": "scales"},
    **{codec: {"codes": "values"} for codec in VALUES},
}
_OPTIONAL_FIELDS = ("scales", "nested_scales", "nested_offset")
