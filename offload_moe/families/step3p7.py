"""Step 3.7: laid out and called as a decorated class, which it is not; its gate is clamped in some layers.

Source: transformers/models/step3p7/modeling_step3p7.py, `Step3p7Experts`.
"""

from collections.abc import Callable
from typing import Any

from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, GATED, gated_shape


def describe(module: Any) -> Description:
    return Description(
        num_experts=module.num_experts,
        shape=gated_shape(module.hidden_dim, module.intermediate_dim),
        parts={GATED: (Part(parameter=GATED),), DOWN: (Part(parameter=DOWN),)},
        between=Between(has_gate=True, act_fn=module.act_fn, apply_gate=module._apply_gate),
    )


def forward(module: Any, bound: Bound) -> Callable[..., Any]:
    return bound


ADAPTER = Adapter(family="step3p7", class_name="Step3p7Experts", describe=describe, forward=forward, special="")
