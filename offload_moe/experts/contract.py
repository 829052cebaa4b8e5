"""The attributes of transformers' experts modules (`transformers/integrations/moe.py`), as a type."""

from typing import Any, Protocol

from torch import Tensor


class ExpertsContract(Protocol):
    """The attributes of every decorated experts class."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool
    config: Any

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...

    def act_fn(self, x: Tensor) -> Tensor: ...

    def post_expert_norm(self, x: Tensor) -> Tensor: ...


def pair_scale_of(module: ExpertsContract) -> float:
    """A factor of every weighted output; 1 except for the modules of some adapters."""
    return getattr(module, "pair_scale", 1.0)
