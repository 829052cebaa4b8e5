"""A model that transformers does not have: Mixtral with a factor on everything that a layer adds to the residual."""

from typing import Any

from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from offload_moe.families.layer_classes import AttentionClass, LayerClass, RouterClass


class ExampleMoeConfig(MixtralConfig):
    model_type = "example_moe"
    residual_multiplier: float = 0.5


class ExampleMoeDecoderLayer(MixtralDecoderLayer):
    def __init__(self, config: ExampleMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
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
