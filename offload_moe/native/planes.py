"""Record layouts as the native kernels read them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.constants import (
    BF16_VALUES,
    CODECS,
    FP32_VALUES,
    GGUF_BLOCKS,
    GGUF_NUMBERS,
    GGUF_SUPERBLOCKS,
)
from offload_moe.native.structs import MatrixStruct
from offload_moe.quant.blockwise import bias_of
from offload_moe.quant.gguf import GGUF, PREFIX, GgufPart, parse_gguf
from offload_moe.quant.layout import BLOCK, ExpertShape, Matrix, RecordLayout, round_up

VALUES = ("bf16", "fp32")  # no codes
DTYPES = {torch.float32: FP32_VALUES, torch.bfloat16: BF16_VALUES}
ABSENT = -1


def unsupported_reason(codec: str, shape: ExpertShape) -> str | None:
    """Why the kernels cannot compute experts of this shape, or None when they can."""
    if (of_gguf := parse_gguf(codec)) is not None:
        try:
            of_gguf.layout(shape)
        except ConfigError as error:
            return str(error)
        return None
    if codec not in CODECS:
        return f"codec {codec} has no native kernel"
    if codec in VALUES and shape.is_transposed:
        return f"{codec} records keep the module's [in, out] matrices, the kernels read [out, in]"
    return None


def not_in_panels_reason(codec: str) -> str | None:
    """Why records of this codec have no panels, or None when they have."""
    has_panels = (codec in CODECS and codec not in VALUES) or codec.partition(":")[0] == GGUF
    return None if has_panels else f"{codec} records keep their rows in order"


def not_in_rows_reason(codec: str) -> str | None:
    """Why no kernel multiplies records of this codec whose rows are in order, or None when one does."""
    return "records of GGUF's types are multiplied in panels only" if parse_gguf(codec) is not None else None


def order_reason(codec: str, *, in_panels: bool) -> str | None:
    """Why no kernel multiplies records of this codec in this order, or None when one does."""
    return not_in_panels_reason(codec) if in_panels else not_in_rows_reason(codec)


def shares_inputs(codecs: Iterable[str]) -> bool:
    """Whether matrices of these codecs take the same quantized activations, so that one call can have all of them."""
    return len({PREFIX if codec.startswith(PREFIX) else codec for codec in codecs}) == 1


def record_structs(codec: str, shape: ExpertShape, layout: RecordLayout, parts: Sequence[int]) -> list[MatrixStruct]:
    """The matrices of a record in panels of so many parts each; of GGUF's types, those of each part."""
    if (of_gguf := parse_gguf(codec)) is not None:
        return [_gguf_struct(part, layout) for part in of_gguf.parts(shape)]
    pairs = zip(shape.matrices, parts, strict=True)
    return [matrix_struct(codec, matrix, layout, num_parts=num_parts) for matrix, num_parts in pairs]


def codec_name(kind: str) -> str:
    """The codec of a type of GGUF by its name in the library's constants."""
    return _CODEC_NAMES.get(kind, kind.lower())


def _gguf_struct(part: GgufPart, layout: RecordLayout) -> MatrixStruct:
    matrix = part.matrix
    numbers = CODECS | GGUF_NUMBERS | GGUF_BLOCKS | GGUF_SUPERBLOCKS
    offset = layout.planes[part.plane].offset
    bias = f"{bias_of(matrix)}.values"
    return MatrixStruct(
        rows=part.num_rows,
        cols=matrix.in_features,
        padded=matrix.in_features,
        codec=numbers[codec_name(part.kind.name)],
        part_rows=part.num_rows,
        codes=offset,
        scales=offset + part.sides_offset,
        nested_scales=ABSENT,
        nested_offset=ABSENT,
        bias=layout.planes[bias].offset + 4 * part.first_row if bias in layout.planes else ABSENT,
        bias_dtype=FP32_VALUES,
    )


def matrix_struct(codec: str, matrix: Matrix, layout: RecordLayout, *, num_parts: int = 0) -> MatrixStruct:
    """Offsets and dimensions of one matrix of a record.

    num_parts: its rows are in panels, which begin anew with each part (gate and up rows are two); 0: in row order.
    """
    planes = _PLANES[codec]
    bias = f"{bias_of(matrix)}.values"
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
_CODEC_NAMES = {"MXFP4": "gguf_mxfp4", "F16": "fp16", "F32": "fp32"}  # of GGUF's types
_OPTIONAL_FIELDS = ("scales", "nested_scales", "nested_offset")
