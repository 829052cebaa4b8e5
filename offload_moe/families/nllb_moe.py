"""NLLB-MoE: encoder-decoder, GShard's top-2 gating.

transformers (5.23, 5.24) sends every token to experts 0 and 1: `NllbMoeExperts` takes its one-hot mask for a list of
expert ids. Published weights do not translate that way, so this adapter follows the router, as transformers 4 did; a
test fails once upstream does so again.

Source: transformers/models/nllb_moe/modeling_nllb_moe.py, `NllbMoeTop2Router`; Lepikhin et al. 2020, "GShard".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, PLAIN, plain_shape

TOP_K = 2


def describe(module: Any) -> Description:
    first = module["expert_0"]
    return Description(
        num_experts=module.num_experts,
        shape=plain_shape(first.fc1.in_features, first.fc1.out_features, has_bias=True),
        parts={
            PLAIN: (Part(parameter="expert_{}.fc1.weight"),),
            DOWN: (Part(parameter="expert_{}.fc2.weight"),),
            f"{PLAIN}_bias": (Part(parameter="expert_{}.fc1.bias"),),
            f"{DOWN}_bias": (Part(parameter="expert_{}.fc2.bias"),),
        },
        between=Between(has_gate=False, act_fn=first.act, pair_scale=1 - module.moe_token_dropout),
    )


def forward(module: Any, bound: Bound) -> Callable[..., Any]:
    def experts(hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        """hidden ``[T, H]``; probabilities ``[T, E]``, zero for whatever is not chosen or beyond the capacity."""
        weights, ids = router_probs.topk(min(TOP_K, module.num_experts), dim=-1)
        return bound(hidden_states, ids.masked_fill(weights == 0, module.num_experts), weights)

    return experts


ADAPTER = Adapter(
    family="nllb_moe",
    class_name="NllbMoeExperts",
    describe=describe,
    forward=forward,
    special="top-2 with capacity; routes as trained, where transformers only ever uses experts 0 and 1",
    top_k=TOP_K,
)
