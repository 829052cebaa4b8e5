"""Which arithmetic computes a layer's experts."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from offload_moe import kernels
from offload_moe.moe.activation import recognize_activation
from offload_moe.moe.contract import ExpertsContract, quirks_of
from offload_moe.moe.device import DeviceArithmetic
from offload_moe.moe.native import NativeArithmetic
from offload_moe.moe.per_expert import ReferenceArithmetic
from offload_moe.moe.routing import Routing
from offload_moe.quant import Codec, ExpertShape
from offload_moe.schedule.scheduler import Lease


class Arithmetic(Protocol):
    """Computes the routed experts of one layer from the records a lease brings."""

    def forward(
        self, hidden: Tensor, weights: Tensor, routing: Routing, lease: Lease, record_of: Callable[[int], Tensor]
    ) -> Tensor:
        """hidden ``[T, H]``, weights ``[T, K]``, record_of: slot -> uint8 record. Returns ``[T, H]``."""
        ...


def choose_arithmetic(
    module: ExpertsContract, shape: ExpertShape, codec: Codec, device: torch.device, *, is_exact: bool = False
) -> Arithmetic:
    """The fastest arithmetic that fits: the device's, the native kernels, or torch where no kernel fits.

    The lossless codec always takes the reference on the CPU: its promise is eager's bits. is_exact: the kernels keep
    activations in full precision.
    """
    if device.type != "cpu":
        return DeviceArithmetic(module, shape, codec)
    native = native_arithmetic(module, shape, codec, is_exact=is_exact) if codec.name != "bf16" else None
    return native or ReferenceArithmetic(module, shape, codec)


def native_arithmetic(
    module: ExpertsContract, shape: ExpertShape, codec: Codec, *, is_exact: bool
) -> NativeArithmetic | None:
    """The native kernels for these experts; None where they do not fit, or are not installed."""
    if not kernels.available() or module.has_post_expert_norm or kernels.unsupported_reason(codec.name, shape):
        return None
    activation = recognize_activation(module, is_interleaved=shape.is_interleaved)
    if activation is None:
        return None
    scale = quirks_of(module).pair_scale
    return NativeArithmetic(shape, codec, activation, has_gate=module.has_gate, pair_scale=scale, is_exact=is_exact)
