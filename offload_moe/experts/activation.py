"""The activation of an experts module, recognized by its results rather than by its name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offload_moe.experts.contract import ExpertsContract

PROBE_WIDTH = 64
PROBE_RANGE = 12.0  # wide enough to reach every clamp that models use


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """One of the kernels' activations, with the parameters of gpt-oss' clamped SwiGLU."""

    name: str
    alpha: float = 1.702
    limit: float = 7.0


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


@torch.no_grad()
def recognize_activation(module: ExpertsContract, *, is_interleaved: bool) -> Activation | None:
    """The kernels' activation that gives the module's own results on a probe; None when none does."""
    probe = torch.linspace(-PROBE_RANGE, PROBE_RANGE, 2 * PROBE_WIDTH).view(1, -1)
    probe = probe[:, torch.randperm(2 * PROBE_WIDTH, generator=torch.Generator().manual_seed(0))]
    expected = module._apply_gate(probe) if module.has_gate else module.act_fn(probe)
    gate, up = (probe[:, ::2], probe[:, 1::2]) if is_interleaved else probe.chunk(2, dim=-1)
    for name, function in _PLAIN.items():
        if _same(function(gate) * up if module.has_gate else function(probe), expected):
            return Activation(name=name)
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if module.has_gate and isinstance(alpha, float | int) and isinstance(limit, float | int):
        clamped = gate.clamp(max=limit)
        if _same((up.clamp(-limit, limit) + 1) * clamped * torch.sigmoid(clamped * alpha), expected):
            return Activation(name="gpt_oss", alpha=float(alpha), limit=float(limit))
    return None


def _same(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
