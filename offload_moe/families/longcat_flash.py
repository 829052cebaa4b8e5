"""LongCat-Flash: some experts compute nothing and return their input; they have ids after the others.

Source: transformers/models/longcat_flash/modeling_longcat_flash.py, `LongcatFlashExperts`; Meituan 2025,
"LongCat-Flash Technical Report", arXiv:2509.01322, section 2.1.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, GATED, gated_shape


def describe(module: Any) -> Description:
    return Description(
        num_experts=module.num_routed_experts,
        shape=gated_shape(module.hidden_size, module.intermediate_size),
        parts={GATED: (Part(parameter=GATED),), DOWN: (Part(parameter=DOWN),)},
        between=Between(has_gate=True, act_fn=module.act_fn),
        num_spare=module.zero_expert_num,  # transformers gives them rows in one of the two parameters
    )


def forward(module: Any, bound: Bound) -> Callable[..., Any]:
    def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden ``[T, H]``, ids and weights ``[T, K]`` -> ``[T, H]``; ids from E on stand for the input itself."""
        total = bound(hidden_states, top_k_index, top_k_weights)
        ids, order = top_k_index.sort(dim=-1, stable=True)
        weights = top_k_weights.gather(1, order).masked_fill(ids < module.num_routed_experts, 0)
        for place in range(ids.shape[-1]):  # one by one, by ascending id, as eager adds them
            total = total + (hidden_states * weights[:, place, None]).to(total.dtype)
        return total

    return experts


ADAPTER = Adapter(
    family="longcat_flash",
    class_name="LongcatFlashExperts",
    describe=describe,
    forward=forward,
    special="zero-compute experts",
)
