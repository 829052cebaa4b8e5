"""Dense gated MLPs and shared experts: one kernel call instead of three linears, an activation and a product.

A dense MLP is an expert that every token is routed to with weight 1, so the expert kernel computes it.
T tokens, H hidden, I intermediate.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from offload_moe import kernels
from offload_moe.dense import KERNEL_DTYPES, QuantLinear
from offload_moe.lean.probe import agree, probes
from offload_moe.moe.activation import Activation, recognize_activation
from offload_moe.moe.contract import ExpertsContract
from offload_moe.quant import Codec, ExpertShape, Matrix

NAMES = ("gate_proj", "up_proj", "down_proj")
CODEC = "int8"  # its planes are rows, so two matrices join without a change; nf4's nested scales do not
TOLERANCE = 1e-2  # the intermediate's int8 blocks start elsewhere only by rounding of the activation


class FusedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` on one record."""

    record: Tensor

    def __init__(self, gate: QuantLinear, up: QuantLinear, down: QuantLinear, activation: Activation) -> None:
        """The three records are copied into one, bit by bit."""
        super().__init__()
        codec, self._mode = gate.codec, gate.mode
        self.hidden_size = gate.in_features
        shape = ExpertShape(
            matrices=(
                Matrix(name="gate_up_proj", out_features=2 * gate.out_features, in_features=gate.in_features),
                Matrix(name="down_proj", out_features=down.out_features, in_features=down.in_features),
            )
        )
        self.register_buffer("record", _join(codec, shape, gate, up, down), persistent=False)
        self._kernel = kernels.ExpertKernel(
            codec.name, shape, codec.layout(shape), activation=activation.name, has_gate=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H] -> [..., H]`` in the dtype of `x`."""
        rows = x.reshape(-1, self.hidden_size).contiguous()
        if rows.dtype not in KERNEL_DTYPES:
            rows = rows.float()
        num_tokens, out = len(rows), torch.empty_like(rows)
        tokens: list[int] = list(range(num_tokens))
        self._kernel.forward(rows, [self.record], [0, num_tokens], tokens, [1.0] * num_tokens, out, mode=self._mode)
        return out.to(x.dtype).view(x.shape)


def fuse_mlps(model: nn.Module) -> int:
    """Replace every gated MLP of quantized linears that is recognized. Returns how many."""
    num_fused = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child)
            if fused is not None:
                setattr(parent, name, fused)
                num_fused += 1
    return num_fused


@torch.inference_mode()
def _fused(module: Any) -> FusedMLP | None:
    linears = [getattr(module, name, None) for name in NAMES]
    if not all(isinstance(linear, QuantLinear) and _can_join(linear) for linear in linears):
        return None
    gate, up, down = cast(list[QuantLinear], linears)
    if len({linear.mode for linear in (gate, up, down)}) > 1 or not callable(getattr(module, "act_fn", None)):
        return None
    activation = recognize_activation(cast(ExpertsContract, _Gated(module.act_fn)), is_interleaved=False)
    if activation is None:
        return None
    fused = FusedMLP(gate, up, down, activation)
    inputs = probes((3, gate.in_features), torch.float32, gate.record.device)
    same = all(agree(fused(x), module(x), is_exact=False, tolerance=TOLERANCE) for x in inputs)
    return fused if same else None


class _Gated:
    """A dense activation as an experts module would present it."""

    has_gate = True

    def __init__(self, act_fn: Callable[[Tensor], Tensor]) -> None:
        self._act_fn = act_fn

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self._act_fn(gate) * up


def _can_join(linear: QuantLinear) -> bool:
    return linear.codec.name == CODEC and linear.has_kernel and linear.bias is None and not linear.shape.biases


def _join(codec: Codec, shape: ExpertShape, gate: QuantLinear, up: QuantLinear, down: QuantLinear) -> Tensor:
    layout = codec.layout(shape)
    record = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=gate.record.device)
    for plane in ("codes", "scales"):
        parts = [codec.layout(linear.shape).view(linear.record, f"weight.{plane}") for linear in (gate, up, down)]
        layout.view(record, f"gate_up_proj.{plane}").copy_(torch.cat(parts[:2]))
        layout.view(record, f"down_proj.{plane}").copy_(parts[2])
    return record
