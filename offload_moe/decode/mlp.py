"""Dense gated MLPs and shared experts: one kernel call instead of three linears, an activation and a product.

A dense MLP is an expert that every token is routed to with weight 1, so the expert kernel computes it.
T tokens, H hidden, I intermediate.
"""

from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from offload_moe.decode.dense import KERNEL_DTYPES, QuantLinear
from offload_moe.decode.probe import Refused, agree, answer, probes, structure
from offload_moe.experts.activation import Activation, recognize_activation
from offload_moe.experts.contract import ExpertsContract
from offload_moe.native import kernels
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
        codec = gate.codec
        self.hidden_size = gate.in_features
        shape = ExpertShape(
            matrices=(
                Matrix(name="gate_up_proj", out_features=2 * gate.out_features, in_features=gate.in_features),
                Matrix(name="down_proj", out_features=down.out_features, in_features=down.in_features),
            )
        )
        self.register_buffer("record", _join(codec, shape, gate, up, down), persistent=False)
        self.kernel = kernels.ExpertKernel(
            codec.name,
            shape,
            codec.layout(shape),
            activation=activation.name,
            has_gate=True,
            in_panels=gate.in_panels,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H] -> [..., H]`` in the dtype of `x`."""
        rows = x.reshape(-1, self.hidden_size).contiguous()
        if rows.dtype not in KERNEL_DTYPES:
            rows = rows.float()
        num_tokens, out = rows.shape[0], torch.empty_like(rows)
        tokens = list(range(num_tokens))
        self.kernel.forward(rows, [self.record], [0, num_tokens], tokens, [1.0] * num_tokens, out)
        return out.to(x.dtype).view(x.shape)


def fuse_mlps(model: nn.Module) -> int:
    """Replace every gated MLP of quantized linears that is recognized. Returns how many."""
    activation_of: dict[Hashable, Activation | None] = {}
    num_fused = 0
    for parent in list(model.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, child in children:
            if not _is_candidate(child):
                continue
            kind = structure(child)
            if kind not in activation_of:
                activation_of[kind] = _recognized_activation(child)
            activation = activation_of[kind]
            if activation is not None:
                setattr(parent, name, FusedMLP(child.gate_proj, child.up_proj, child.down_proj, activation))
                num_fused += 1
    return num_fused


def _is_candidate(module: Any) -> bool:
    linears: list[Any] = [getattr(module, name, None) for name in NAMES]
    can_join = all(isinstance(linear, QuantLinear) and _can_join(linear) for linear in linears)
    return can_join and callable(getattr(module, "act_fn", None)) and len({linear.in_panels for linear in linears}) == 1


@torch.inference_mode()
def _recognized_activation(module: Any) -> Activation | None:
    """The activation with which the fused form gives the module's results."""
    activation = recognize_activation(cast(ExpertsContract, _Gated(module.act_fn)), is_interleaved=False)
    if activation is None:
        return None
    fused = FusedMLP(module.gate_proj, module.up_proj, module.down_proj, activation)
    inputs = probes((3, fused.hidden_size), torch.float32, fused.record.device)
    try:
        expected = [answer(module, x) for x in inputs]
    except Refused:
        return None
    pairs = zip(inputs, expected, strict=True)
    same = all(agree(fused(x), theirs, is_exact=False, tolerance=TOLERANCE) for x, theirs in pairs)
    return activation if same else None


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
    """The three records in one: joined rows are joined panels, too, since panels begin anew with each part."""
    layout = codec.layout(shape)
    record = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=gate.record.device)
    for plane in ("codes", "scales"):
        parts = [codec.layout(linear.shape).view(linear.record, f"weight.{plane}") for linear in (gate, up, down)]
        layout.view(record, f"gate_up_proj.{plane}").copy_(torch.cat(parts[:2]))
        layout.view(record, f"down_proj.{plane}").copy_(parts[2])
    return record
