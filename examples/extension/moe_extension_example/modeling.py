"""A model that transformers does not have, and what offload-moe needs for its experts and its layers.

It is Mixtral with a module per expert, and with a factor on everything that a layer adds to the residual.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from offload_moe.families.layer_classes import AttentionClass, LayerClass, RouterClass
from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part
from offload_moe.families.shapes import DOWN, GATED, gated_shape


class ExampleMoeConfig(MixtralConfig):
    model_type = "example_moe"
    residual_multiplier: float = 0.5


class ExampleMoeMLP(nn.Module):
    """One expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(rows)) * self.up_proj(rows))


class ExampleMoeExperts(nn.ModuleList):
    """Outside transformers' experts registry, so it needs an adapter."""

    def __init__(self, config: ExampleMoeConfig) -> None:
        super().__init__(
            ExampleMoeMLP(config.hidden_size, config.intermediate_size) for _ in range(config.num_local_experts)
        )

    def forward(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden ``[T, H]``, expert ids and weights ``[T, K]`` -> ``[T, H]``."""
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, places = torch.where(ids == number)
            if len(tokens):
                result.index_add_(0, tokens, expert(hidden_states[tokens]) * weights[tokens, places, None])
        return result


class ExampleMoeDecoderLayer(MixtralDecoderLayer):
    def __init__(self, config: ExampleMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp.experts = ExampleMoeExperts(config)
        self.residual_multiplier = config.residual_multiplier

    def forward(self, hidden_states: Tensor, **settings: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **settings)
        hidden_states = hidden_states + attended * self.residual_multiplier
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.residual_multiplier


class ExampleMoeForCausalLM(MixtralForCausalLM):
    config_class = ExampleMoeConfig

    def __init__(self, config: ExampleMoeConfig) -> None:
        super().__init__(config)
        for number in range(config.num_hidden_layers):
            self.model.layers[number] = ExampleMoeDecoderLayer(config, number)


# What ExampleMoeDecoderLayer computes. Strings are attributes of the module that has the setting.
LAYER = LayerClass(
    router=RouterClass(is_normalized=True),
    attention=AttentionClass(window="config.sliding_window"),
    residual_scale="residual_multiplier",
)


def describe(experts: ExampleMoeExperts) -> Description:
    first = experts[0]
    return Description(
        num_experts=len(experts),
        shape=gated_shape(first.gate_proj.in_features, first.gate_proj.out_features),
        parts={
            GATED: (Part(parameter="{}.gate_proj.weight"), Part(parameter="{}.up_proj.weight")),
            DOWN: (Part(parameter="{}.down_proj.weight"),),
        },
        between=Between(has_gate=True, act_fn=nn.functional.silu),
    )


def forward(experts: ExampleMoeExperts, bound: Bound) -> Callable[..., Tensor]:
    return bound  # it has the arguments of ExampleMoeExperts.forward


ADAPTER = Adapter(
    family="moe_extension_example",
    class_name="ExampleMoeExperts",
    describe=describe,
    forward=forward,
    special="",
)
