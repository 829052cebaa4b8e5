"""Blocks behind attention whose parts a decode step calls: a router, experts, perhaps a shared expert."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.decode.dense import number_linear
from offload_moe.decode.mlp import FusedMLP
from offload_moe.decode.router import Routed, StepRouter
from offload_moe.decode.step import is_fp32
from offload_moe.errors import ConfigError
from offload_moe.experts.attach import AdaptedForward, BoundExperts
from offload_moe.experts.native import NativeArithmetic
from offload_moe.families.layer_reference import tensor_at
from offload_moe.families.layer_spec import LayerSpec, RouterSpec
from offload_moe.native import kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainBlock:
    """``experts(x)``, or ``experts(x) + shared(x)``, or ``experts(x) + sigmoid(gate . x) * shared(x)``.

    router: the module, for its observers. is_exact: its own code gives the bits of `route`. experts: the module whose
    forward has them. scales_inputs: weights multiply what the experts are given, not what they give.
    """

    router: nn.Module
    route: kernels.RouterKernel
    is_exact: bool
    experts: Any
    shared: kernels.SharedKernel | None
    scales_inputs: bool = False

    @property
    def bound(self) -> BoundExperts:
        forward: BoundExperts | AdaptedForward = self.experts.forward
        return forward.bound if isinstance(forward, AdaptedForward) else forward

    def compute(self, normed: Tensor, routed: Routed) -> Tensor:
        """normed ``[T, H]``, and what the router gave -> ``[T, H]``: the bits of each row alone.

        Other arithmetic than the kernels' has them for few rows.
        """
        _, weights, ids = routed
        experts = self._scaled if self.scales_inputs else self.experts
        is_whole = len(normed) == 1 or len(normed) > kernels.MAX_ROWS
        if is_whole or isinstance(self.bound.arithmetic, NativeArithmetic):
            out: Tensor = experts(normed, ids, weights)
        else:
            rows = zip(normed.split(1), ids.split(1), weights.split(1), strict=True)
            out = torch.cat([experts(*row) for row in rows])
        if self.shared is not None:
            self.shared.add(normed, out)
        return out

    def _scaled(self, normed: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """A row for each token and expert; a token's results are added by ascending id."""
        rows = (normed[:, None] * weights[..., None]).flatten(0, 1)
        outs = self.bound(rows, ids.reshape(-1, 1), torch.ones(len(rows), 1)).view(*ids.shape, -1)
        order = ids.argsort(dim=-1)[..., None].expand_as(outs)
        total = torch.zeros_like(normed)
        for out in outs.gather(1, order).unbind(1):
            total += out
        return total


def plain_block(layer: nn.Module, spec: LayerSpec) -> PlainBlock | None:
    """The parts of a layer's block; None where it is a dense MLP, or has a part that no kernel computes."""
    if spec.router is None:
        return None
    experts, router = layer.get_submodule(spec.bound_path), layer.get_submodule(spec.router.path)
    forward = vars(router).get("forward")
    route = forward.kernel if isinstance(forward, StepRouter) else _route(layer, spec.router)
    # A forward of an adapter may do more than pass on what it is given; that of scaled inputs is declared.
    kind = AdaptedForward if spec.router.scales_inputs else BoundExperts
    if route is None or not isinstance(vars(experts).get("forward"), kind):
        return None
    shared = None
    if spec.shared is not None:
        mlp = layer.get_submodule(spec.shared.gate.rpartition(".")[0])
        gate = layer.get_submodule(spec.shared.scale_gate) if spec.shared.scale_gate else None
        if not isinstance(mlp, FusedMLP) or not (gate is None or _is_gate(gate)):
            return None
        shared = _shared_kernel(mlp, gate)
    return PlainBlock(
        router=router,
        route=route,
        is_exact=isinstance(forward, StepRouter),
        experts=experts,
        shared=shared,
        scales_inputs=spec.router.scales_inputs,
    )


def _route(layer: nn.Module, spec: RouterSpec) -> kernels.RouterKernel | None:
    paths = (spec.weight, spec.bias, spec.correction)
    weight, bias, correction = (tensor_at(layer, path).detach() if path else None for path in paths)
    assert weight is not None
    if correction is not None:
        correction = correction.flatten()
    if weight.dtype != torch.float32 or not weight.is_cpu or not is_fp32(bias) or not is_fp32(correction):
        return None
    try:
        return kernels.RouterKernel(
            number_linear(weight, bias),
            top_k=spec.top_k,
            is_of_chosen=spec.is_normalized,
            is_sigmoid=spec.scoring == "sigmoid",
            correction=correction,
            num_groups=spec.num_groups,
            num_chosen_groups=spec.num_chosen_groups,
            num_best=1 if spec.group_score == "max" else 2,
            jitter=spec.jitter if spec.scoring == "sparsemixer" else None,
            scale=spec.scale,
        )
    except ConfigError:
        return None


def _is_gate(linear: nn.Module) -> bool:
    if not isinstance(linear, nn.Linear):
        return False
    return linear.out_features == 1 and linear.bias is None and linear.weight.is_cpu and is_fp32(linear.weight)


def _shared_kernel(mlp: FusedMLP, gate: nn.Module | None) -> kernels.SharedKernel:
    weight = None if gate is None else gate.weight.detach()  # type: ignore[operator]
    return kernels.SharedKernel(mlp.kernel, weight)
