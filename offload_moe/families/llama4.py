"""Llama 4: each expert's input is scaled by its router score, not its output; a shared expert beside them.

Source: transformers/models/llama4/modeling_llama4.py, `Llama4TextMoe`, which multiplies every token with every expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, GATED, gated_shape


def describe(module: Any) -> Description:
    experts = module.experts
    act_fn: Callable[[Tensor], Tensor] = experts.act_fn

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * act_fn(gate)

    return Description(
        num_experts=experts.num_experts,
        shape=gated_shape(experts.hidden_size, experts.expert_dim, is_transposed=True),
        parts={GATED: (Part(parameter="experts.gate_up_proj"),), DOWN: (Part(parameter="experts.down_proj"),)},
        between=Between(has_gate=True, act_fn=experts.act_fn, apply_gate=apply_gate),
        is_block=True,
    )


def forward(module: Any, bound: Bound) -> Callable[..., Any]:
    def block(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden ``[..., H]`` -> output ``[T, H]`` and router logits ``[T, E]``."""
        hidden = hidden_states.reshape(-1, module.hidden_dim)
        scores, logits = module.router(hidden)
        values, ids = scores.topk(module.top_k, dim=-1)
        out = module.shared_expert(hidden)
        routed = torch.zeros_like(out)
        for place in range(module.top_k):
            chosen, score = ids[:, place : place + 1], values[:, place : place + 1]
            routed += bound(hidden * score, chosen, torch.ones_like(score))
        return out.add_(routed), logits

    return block


ADAPTER = Adapter(
    family="llama4",
    class_name="Llama4TextMoe",
    describe=describe,
    forward=forward,
    special="top-1, inputs scaled by the router",
)
