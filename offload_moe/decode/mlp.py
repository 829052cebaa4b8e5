"""Dense gated MLPs and shared experts: one kernel call instead of three linears, an activation and a product.

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
from offload_moe.families.read_layer import GATED
from offload_moe.native import kernels

TOLERANCE = 1e-2  # an activation that is rounded otherwise may be quantized otherwise


class FusedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` on the records of three linears."""

    def __init__(self, gate: QuantLinear, up: QuantLinear, down: QuantLinear, activation: Activation) -> None:
        """The records are shared with the linears."""
        super().__init__()
        self.hidden_size = gate.in_features
        for name, linear in zip(GATED, (gate, up, down), strict=True):
            self.register_buffer(name.replace("proj", "record"), linear.record, persistent=False)
        self.projections = gate.as_projection(), up.as_projection(), down.as_projection()
        self.activation = activation.name
        self.kernel = kernels.MlpKernel(*self.projections, activation=activation.name)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H] -> [..., H]`` in the dtype of `x`."""
        rows = x.reshape(-1, self.hidden_size).contiguous()
        if rows.dtype not in KERNEL_DTYPES:
            rows = rows.float()
        out = torch.empty_like(rows)
        self.kernel.forward(rows, out)
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
    linears: list[Any] = [getattr(module, name, None) for name in GATED]
    return (
        all(isinstance(linear, QuantLinear) and linear.has_kernel and linear.bias is None for linear in linears)
        and callable(_activation_of(module))
        and kernels.shares_inputs((linears[0].codec.name, linears[1].codec.name))
        and len({linear.in_panels for linear in linears}) == 1
    )


def _activation_of(module: Any) -> Any:
    """None where it has none under a usual name."""
    return getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)


@torch.inference_mode()
def _recognized_activation(module: Any) -> Activation | None:
    """The activation with which the fused form gives the module's results."""
    activation = recognize_activation(cast(ExpertsContract, _Gated(_activation_of(module))), is_interleaved=False)
    if activation is None:
        return None
    fused = FusedMLP(module.gate_proj, module.up_proj, module.down_proj, activation)
    inputs = probes((3, fused.hidden_size), torch.float32, module.gate_proj.record.device)
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
