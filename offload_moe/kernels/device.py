"""Linear layers on records that lie in device memory, through bitsandbytes and torch.

The same functions run on the CPU, where they are tested. bitsandbytes' custom operators check neither device nor dtype,
so the wrapper does.

t tokens, O out features, K in features, P padded in features.
"""

from functools import cache

import torch
from torch import Tensor

from offload_moe.quant import Codec, ExpertShape, RecordLayout
from offload_moe.quant.blockwise import bias_of
from offload_moe.quant.layout import Matrix
from offload_moe.quant.nf4 import BLOCK, dynamic_map

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def record_linear(x: Tensor, record: Tensor, shape: ExpertShape, codec: Codec, name: str) -> Tensor:
    """``x [t, K] @ W.T + bias -> [t, O]`` with the matrix `name` of a record; rows in kernel order (gate before up).

    nf4 is multiplied as it lies by `gemm_4bit`; the other codecs are decoded first.
    """
    if codec.name == "nf4":
        layout = codec.layout(shape)
        matrix = next(m for m in shape.matrices if m.name == name)
        return _nf4_linear(x, record, layout, matrix)
    tensors = codec.decode(shape, record, x.dtype)
    rows = shape.to_kernel_rows(name, tensors[name])
    bias_name = "bias" if name == "weight" else f"{name}_bias"
    bias = shape.to_kernel_rows(bias_name, tensors[bias_name]) if bias_name in tensors else None
    return torch.nn.functional.linear(x, rows, bias)


def _nf4_linear(x: Tensor, record: Tensor, layout: RecordLayout, matrix: Matrix) -> Tensor:
    assert x.device == record.device, f"x is on {x.device}, the record on {record.device}"
    assert x.dtype in COMPUTE_DTYPES, x.dtype
    codes = layout.view(record, f"{matrix.name}.codes")
    padded_in = codes.shape[1] * 2
    if padded_in != matrix.in_features:
        x = torch.nn.functional.pad(x, (0, padded_in - matrix.in_features))
    bias_plane = f"{bias_of(matrix)}.values"
    bias = layout.view(record, bias_plane).to(x.dtype) if bias_plane in layout.planes else None
    out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x,
        codes.view(-1, 1),
        [matrix.out_features, padded_in],
        layout.view(record, f"{matrix.name}.absmax_scale"),
        BLOCK,
        "nf4",
        bias,
        absmax_8bit=layout.view(record, f"{matrix.name}.absmax"),
        absmax_code=_dynamic_map_on(x.device),
        absmax_offset=layout.view(record, f"{matrix.name}.absmax_offset").view(()),
    )
    return out


@cache
def _dynamic_map_on(device: torch.device) -> Tensor:
    import bitsandbytes  # noqa: F401  # registers the operator

    return dynamic_map().to(device)
