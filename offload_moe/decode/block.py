"""The blocks behind attention whose parts a decode step calls: a router, experts, perhaps a shared expert."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.decode.mlp import FusedMLP
from offload_moe.decode.router import Routed, StepRouter
from offload_moe.experts.attach import BoundExperts
from offload_moe.native import kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainBlock:
    """``experts(x)``, or ``experts(x) + shared(x)``, or ``experts(x) + sigmoid(gate . x) * shared(x)``."""

    router: Any
    experts: Any
    shared: kernels.SharedKernel | None

    @property
    def route(self) -> StepRouter:
        forward: StepRouter = self.router.forward
        return forward

    @property
    def bound(self) -> BoundExperts:
        forward: BoundExperts = self.experts.forward
        return forward

    def compute(self, normed: Tensor, routed: Routed) -> Tensor:
        """normed ``[1, H]``, and what the router gave -> ``[1, H]``."""
        _, weights, ids = routed
        out: Tensor = self.experts(normed, ids, weights)
        if self.shared is not None:
            self.shared.add(normed, out)
        return out


def plain_block(block: nn.Module) -> PlainBlock | None:
    """The parts of this block by their kinds; None where it has others. What it makes of them is for a probe to see."""
    children = list(block.children())
    routers = [child for child in children if isinstance(vars(child).get("forward"), StepRouter)]
    experts = [child for child in children if isinstance(vars(child).get("forward"), BoundExperts)]
    shared = [child for child in children if isinstance(child, FusedMLP)]
    gates = [child for child in children if isinstance(child, nn.Linear) and _is_gate(child)]
    is_plain = len(routers) == len(experts) == 1 and len(shared) <= 1 and len(gates) <= len(shared)
    if not is_plain or len(children) != len(routers) + len(experts) + len(shared) + len(gates):
        return None
    kernel = _shared_kernel(shared[0], gates[0] if gates else None) if shared else None
    return PlainBlock(router=routers[0], experts=experts[0], shared=kernel)


def _is_gate(linear: nn.Linear) -> bool:
    weight = linear.weight
    is_plain = weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()
    return linear.out_features == 1 and linear.bias is None and is_plain


def _shared_kernel(mlp: FusedMLP, gate: nn.Linear | None) -> kernels.SharedKernel:
    weight = None if gate is None else gate.weight.detach()
    return kernels.SharedKernel(mlp.kernel, mlp.record, weight, hidden=mlp.hidden_size, mode=mlp.mode)
