"""The working memory of an attention, in elements, derived from a module's projections.

N heads, T new tokens, S all tokens, R latent rank, P rotated dims, K unrotated key dims, V value dims.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork:
    """The working memory of one attention, in elements.

    projected: per new token. expanded: per token of the context; decoded: the same for one new token.

    Additional on the CPU: padding, per token of the context; scores, per new token and token of the context.
    """

    projected: int
    expanded: int
    decoded: int
    padding: int = 0
    scores: int = 0

    def elements(self, num_new: int, context: int, *, on_cpu: bool) -> int:
        """T new tokens among S: everything that is alive at once."""
        if num_new == 1:
            return self.projected + context * self.decoded
        added = self.padding + num_new * self.scores if on_cpu else 0
        return num_new * self.projected + context * (self.expanded + added)


def describe_work(module: Any, *, is_absorbed: bool) -> AttentionWork:
    """The working memory of an attention module.

    is_absorbed: `offload_moe.decode` computes with the latents.
    """
    linears = sum(child.out_features for child in module.children() if isinstance(child, nn.Linear))
    queries = out_features(module, "q_proj") or out_features(module, "q_b_proj")
    expansion, latent = out_features(module, "kv_b_proj"), out_features(module, "kv_a_proj_with_mqa")
    output = getattr(module, "o_proj", None)
    values = int(output.in_features) if isinstance(output, nn.Linear) else 0
    expanded = queries + values + expansion
    if not expansion:
        return AttentionWork(projected=linears, expanded=expanded, decoded=expanded)
    # For new tokens the queries three times, N (K + P): projected, concatenated with their rotated dims, and scaled;
    # for all tokens the expansion, N (K + V), concatenated keys, N (K + P), and values, padded to that on the CPU.
    # Without padding torch scales the keys instead, and materializes scores and shares of all heads, and the mask
    # twice as numbers.
    padding = max(0, queries - values)
    num_heads = _num_heads(module)
    return AttentionWork(
        projected=linears - expansion + 2 * queries,
        expanded=expanded,
        # Scores and shares in the latent space, and the copy of a cache that outgrows its tensor.
        decoded=2 * num_heads + latent if is_absorbed else expanded + padding + 2 * num_heads,
        padding=padding,
        scores=1 if is_absorbed else 2 * num_heads + 3,
    )


def _num_heads(module: Any) -> int:
    """Of this layer: a config whose layers differ has no number for all."""
    if isinstance(count := getattr(module, "num_heads", None), int):
        return count
    return int(module.config.num_attention_heads)


def out_features(module: nn.Module, name: str) -> int:
    """Output features of a linear child; 0 if there is none of that name."""
    linear = getattr(module, name, None)
    return int(linear.out_features) if isinstance(linear, nn.Linear) else 0
