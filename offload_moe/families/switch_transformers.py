"""Switch Transformers: encoder-decoder, top-1; a token whose expert is full skips it.

Source: transformers/models/switch_transformers/modeling_switch_transformers.py, `SwitchTransformersExperts`; Fedus,
Zoph and Shazeer 2021, "Switch Transformers", section 2.2 (expert capacity).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, PLAIN, plain_shape


def describe(module: Any) -> Description:
    first = module["expert_0"]
    return Description(
        num_experts=module.num_experts,
        shape=plain_shape(first.wi.in_features, first.wi.out_features, has_bias=False),
        parts={PLAIN: (Part(parameter="expert_{}.wi.weight"),), DOWN: (Part(parameter="expert_{}.wo.weight"),)},
        between=Between(has_gate=False, act_fn=first.act),
    )


def forward(module: Any, bound: Bound) -> Callable[..., Any]:
    def experts(hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden ``[T, H]``, one-hot ``[T, 1, E]`` that is all zero beyond the capacity, probability ``[T, 1]``."""
        is_kept, expert = selected_experts.max(dim=-1)
        ids = expert.masked_fill(is_kept == 0, module.num_experts)
        return bound(hidden_states, ids, routing_weights)

    return experts


ADAPTER = Adapter(
    family="switch_transformers",
    class_name="SwitchTransformersExperts",
    describe=describe,
    forward=forward,
    special="top-1 with capacity",
    top_k=1,
)
