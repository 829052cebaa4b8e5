"""Dense linear layers whose weight stays in its codec's record."""

import torch
from torch import Tensor, nn

from offload_moe import kernels
from offload_moe.kernels.device import record_linear
from offload_moe.quant import Codec, ExpertShape


class QuantLinear(nn.Module):
    """``y = x W^T + b`` on a record, with the native kernels on the CPU and bitsandbytes on the device.

    O out features, K in features. The record is a buffer, so it moves with the model; it is not a parameter, because
    its bytes are not numbers.
    """

    record: Tensor
    bias: nn.Parameter | None

    def __init__(self, record: Tensor, shape: ExpertShape, codec: Codec) -> None:
        """shape: one matrix named `weight`, and a bias named `bias` where the record holds one.

        A layer whose bias is kept outside the record sets `bias` afterwards.
        """
        super().__init__()
        self.register_buffer("record", record, persistent=False)
        self.register_parameter("bias", None)
        self.in_features = shape.matrices[0].in_features
        self.out_features = shape.matrices[0].out_features
        self._shape = shape
        self._codec = codec
        self._kernel: kernels.LinearKernel | None = None
        if kernels.available() and kernels.unsupported_reason(codec.name, shape) is None:
            self._kernel = kernels.LinearKernel(codec.name, [shape], [codec.layout(shape)])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., O]`` in the dtype of `x`."""
        rows = x.reshape(-1, self.in_features)
        if rows.is_cpu and self._kernel is not None and rows.dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(rows.shape[0], self.out_features, dtype=rows.dtype)
            self._kernel.forward(rows.contiguous(), [self.record], [out])
        else:
            out = record_linear(rows, self.record, self._shape, self._codec, "weight")
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self._codec.name}"
