"""JetMoE: the experts of the MLP are offloaded; those of its attention stay dense.

Its attention routes too (query and output projections per expert, `JetMoeMoA`). A token needs them twice, before and
after its keys are read, and they are a fifth of the experts' weights: they stay on the device like any projection.

Source: transformers/models/jetmoe/modeling_jetmoe.py, `JetMoeMoE` and `JetMoeTopKGating`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, GATED, gated_shape


def describe(module: Any) -> Description:
    return Description(
        num_experts=module.input_linear.num_experts,
        shape=gated_shape(module.input_size, module.hidden_size),
        parts={GATED: (Part(parameter="input_linear.weight"),), DOWN: (Part(parameter="output_linear.weight"),)},
        between=Between(has_gate=True, act_fn=module.activation),
        is_block=True,
    )


def forward(module: Any, bound: Bound) -> Callable[..., Any]:
    top_k = module.router.top_k
    bias: Tensor = module.bias

    def block(layer_input: Tensor) -> Tensor:
        """``[B, S, H] -> [B, S, H]``."""
        hidden = layer_input.reshape(-1, layer_input.shape[-1])
        places, _, gates, _, logits = module.router(hidden)  # pairs sorted by expert
        weights = torch.empty_like(gates).scatter_(0, places, gates).view(-1, top_k)
        ids = logits.topk(top_k, dim=1).indices
        return bound(hidden, ids, weights).view(layer_input.shape) + bias

    return block


ADAPTER = Adapter(
    family="jetmoe",
    class_name="JetMoeMoE",
    describe=describe,
    forward=forward,
    special="experts of the attention stay dense",
    left_alone=("JetMoeMoA",),
)
