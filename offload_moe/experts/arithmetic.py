"""The choice of the arithmetic that computes a layer's experts."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from offload_moe.experts.activation import recognize_activation
from offload_moe.experts.contract import ExpertsContract, pair_scale_of
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.experts.native import NativeArithmetic
from offload_moe.experts.per_expert import ReferenceArithmetic
from offload_moe.experts.routing import Routing
from offload_moe.native import kernels
from offload_moe.quant import Codec, ExpertShape
from offload_moe.residency.lease import Lease


class Arithmetic(Protocol):
    """Computes the routed experts of one layer from the records of a lease.

    order: the panels in which it reads records; None: rows.
    """

    @property
    def order(self) -> kernels.PanelOrder | None: ...

    def forward(
        self, hidden: Tensor, weights: Tensor, routing: Routing, lease: Lease, record_of: Callable[[int], Tensor]
    ) -> Tensor:
        """hidden ``[T, H]``, weights ``[T, K]``, record_of: slot -> uint8 record. Returns ``[T, H]``."""
        ...


def choose_arithmetic(
    module: ExpertsContract,
    shape: ExpertShape,
    codec: Codec,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    is_exact: bool = False,
    in_panels: bool = False,
) -> Arithmetic:
    """The fastest arithmetic that fits: the device's, the native kernels, or torch where no kernel fits.

    dtype: of the hidden state. is_exact: the kernels keep activations in full precision; see also `keeps_eagers_bits`.
    in_panels: a device reads records in the order of the device pass.
    """
    if device.type != "cpu":
        return DeviceArithmetic(module, shape, codec, in_panels=in_panels)
    wants_kernels = not keeps_eagers_bits(codec.name, device, dtype, is_exact=is_exact)
    native = native_arithmetic(module, shape, codec, is_exact=is_exact) if wants_kernels else None
    return native or ReferenceArithmetic(module, shape, codec)


def native_arithmetic(
    module: ExpertsContract, shape: ExpertShape, codec: Codec, *, is_exact: bool
) -> NativeArithmetic | None:
    """The native kernels for these experts; None where they do not fit."""
    if module.has_post_expert_norm or kernels.unsupported_reason(codec.name, shape):
        return None
    if is_exact and kernels.not_in_rows_reason(codec.name):
        return None
    activation = recognize_activation(module, is_interleaved=shape.is_interleaved)
    if activation is None:
        return None
    scale = pair_scale_of(module)
    return NativeArithmetic(shape, codec, activation, has_gate=module.has_gate, pair_scale=scale, is_exact=is_exact)


def notice_without_kernel(module: ExpertsContract, shape: ExpertShape, codec: Codec) -> str:
    """The message about experts that no native kernel computes."""
    reason = (
        kernels.unsupported_reason(codec.name, shape)
        or kernels.not_in_rows_reason(codec.name)
        or "no kernel has their activation"
    )
    if module.has_post_expert_norm:
        reason = "a norm follows each expert"
    return f"torch computes this model's experts on the CPU, several times slower than the native kernels: {reason}."


def keeps_eagers_bits(codec: str, device: torch.device, dtype: torch.dtype, *, is_exact: bool) -> bool:
    """Whether the operations are eager's own, on the same operands and in its order.

    Results then have eager's bits as far as the math library's product of a row depends on its operands alone
    (MKL's may change with the number of rows). The lossless codec promises that, except where the CPU computes in
    bf16: eager rounds everywhere there, and the kernels, which sum in fp32, are faster and more precise.
    `is_exact` gives eager's bits there too.
    """
    return codec == "bf16" and (device.type != "cpu" or is_exact or dtype != torch.bfloat16)
