"""The dense model's own arithmetic, one half-layer at a time, so that calibration can look between the halves.

Shapes: B sequences, T positions, H hidden, I intermediate. Equal to transformers' Llama (tested).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_moe.demo.dense import DenseModel


class DenseForward:
    """Half-layers of a dense Llama model in fp32."""

    def __init__(self, dense: DenseModel, num_positions: int) -> None:
        self._dense = dense
        config = dense.config
        self._num_heads: int = config["num_attention_heads"]
        self._num_kv_heads: int = config["num_key_value_heads"]
        self._eps: float = config["rms_norm_eps"]
        self._cos, self._sin = _rotary_tables(config, num_positions)

    def weight(self, layer: int, module: str) -> Tensor:
        return self._dense.tensors[f"model.layers.{layer}.{module}.weight"]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to hidden states [B, T, H]."""
        return F.embedding(ids, self._dense.tensors["model.embed_tokens.weight"])

    def attend(self, layer: int, hidden: Tensor, norm: Tensor | None = None) -> Tensor:
        """The attention half, residual included: [B, T, H] to [B, T, H]; `norm` replaces the layer's own."""
        normed = self.norm(hidden, self.weight(layer, "input_layernorm") if norm is None else norm)
        query = self._rotate(self._heads(layer, "q_proj", normed, self._num_heads))
        key = self._rotate(self._heads(layer, "k_proj", normed, self._num_kv_heads))
        value = self._heads(layer, "v_proj", normed, self._num_kv_heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return hidden + F.linear(attended.transpose(1, 2).flatten(2), self.weight(layer, "self_attn.o_proj"))

    def feed_forward_input(self, layer: int, hidden: Tensor, norm: Tensor | None = None) -> Tensor:
        """What the feed-forward half sees: [..., H] to [..., H]; `norm` replaces the layer's own."""
        return self.norm(hidden, self.weight(layer, "post_attention_layernorm") if norm is None else norm)

    def feed_forward(self, layer: int, hidden: Tensor, norm: Tensor | None = None) -> Tensor:
        """The dense feed-forward half, residual included: [..., H] to [..., H]."""
        neurons = self.activations(layer, self.feed_forward_input(layer, hidden, norm))
        return hidden + F.linear(neurons, self.weight(layer, "mlp.down_proj"))

    def last_hidden(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to the normed hidden states [B, T, H] that the output head reads."""
        hidden = self.embed(ids)
        for layer in range(self._dense.config["num_hidden_layers"]):
            hidden = self.feed_forward(layer, self.attend(layer, hidden))
        return self.norm(hidden, self._dense.tensors["model.norm.weight"])

    def activations(self, layer: int, normed: Tensor) -> Tensor:
        """SwiGLU neurons: [..., H] to [..., I]."""
        gate = F.silu(F.linear(normed, self.weight(layer, "mlp.gate_proj")))
        return gate * F.linear(normed, self.weight(layer, "mlp.up_proj"))

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self._eps)

    def _heads(self, layer: int, module: str, normed: Tensor, num_heads: int) -> Tensor:
        projected = F.linear(normed, self.weight(layer, f"self_attn.{module}"))
        return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def _rotate(self, heads: Tensor) -> Tensor:
        length = heads.shape[-2]
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return heads * self._cos[:length] + turned * self._sin[:length]


def _rotary_tables(config: dict[str, Any], num_positions: int) -> tuple[Tensor, Tensor]:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    frequencies = 1.0 / config["rope_parameters"]["rope_theta"] ** exponents
    angles = torch.outer(torch.arange(num_positions).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()
