"""The norms of a decoder as the card's kernels read them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.errors import DevicePassUnavailable
from offload_moe.families.layer_spec import NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """``x / rms(x) * weight``; with a bias a layer norm."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float


def norm_at(layer: nn.Module, spec: NormSpec, columns: int) -> Norm:
    """One of a layer, over so many columns."""
    return norm_of(layer.get_submodule(spec.path), spec, columns, next(layer.parameters()).device)


def norm_of(module: Any, spec: NormSpec, columns: int, device: torch.device) -> Norm:
    """A module with the numbers that its declaration says. Raises: DevicePassUnavailable."""
    if not spec.has_weight:
        return Norm(weight=torch.ones(columns, device=device), bias=None, epsilon=spec.epsilon)
    if spec.is_centered and module.bias is None:
        raise DevicePassUnavailable("a layer norm without a bias")
    weight = module.weight.detach().float()
    return Norm(
        weight=1.0 + weight if spec.is_from_one else weight,
        bias=module.bias.detach() if spec.is_centered else None,
        epsilon=spec.epsilon,
    )
