"""DBRX: experts lie one below the other in three matrices, of which the last is kept the other way round.

Source: transformers/models/dbrx/modeling_dbrx.py, `DbrxExperts`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, GATED, gated_shape


def describe(module: Any) -> Description:
    num_rows = module.ffn_hidden_size
    act_fn: Callable[[Tensor], Tensor] = module.mlp.activation_fn

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act_fn(gate.contiguous()) * up  # an activation rounds the ends of rows that lie apart in another way

    return Description(
        num_experts=module.num_experts,
        shape=gated_shape(module.hidden_size, num_rows),
        parts={
            GATED: (Part(parameter="mlp.w1", num_rows=num_rows), Part(parameter="mlp.v1", num_rows=num_rows)),
            DOWN: (Part(parameter="mlp.w2", num_rows=num_rows, is_transposed=True),),
        },
        between=Between(has_gate=True, act_fn=act_fn, apply_gate=apply_gate),
    )


def forward(module: Any, bound: Bound) -> Callable[..., Any]:
    def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden ``[B, S, H]``, ids and weights ``[B * S, K]`` -> ``[B, S, H]``."""
        rows = hidden_states.reshape(-1, module.hidden_size)
        return bound(rows, top_k_index, top_k_weights).view(hidden_states.shape)

    return experts


ADAPTER = Adapter(family="dbrx", class_name="DbrxExperts", describe=describe, forward=forward, special="")
