"""The numbers that decide what the demo model is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a dense model's feed-forward layers are split, calibrated and trained.

    The first `num_dense_layers` layers stay whole. In the others `num_shared` neurons form the shared expert and the
    rest form `num_experts` experts of equal size, `top_k` of which run for a token.

    Calibration reads `num_sequences` sequences of `num_positions` tokens of text and `num_vocabulary` more of tokens
    drawn from the whole vocabulary, which count `vocabulary_weight`: the text has few rare words, and the first layers
    know words rather than contexts. Clustering looks at `num_cluster_tokens` tokens.

    Training takes `num_steps` steps of `batch_size` sequences; corrections of `gate_proj` and `up_proj` have rank
    `rank`, those of `down_proj` twice that.
    """

    num_dense_layers: int = 1
    num_shared: int = 512
    num_experts: int = 32
    top_k: int = 15
    num_sequences: int = 112
    num_positions: int = 256
    num_vocabulary: int = 16
    vocabulary_weight: float = 0.3
    num_cluster_tokens: int = 12288
    num_kmeans_rounds: int = 6
    num_routing_rounds: int = 5
    router_ridge: float = 0.001
    down_ridge: float = 0.5
    rank: int = 8
    num_steps: int = 60
    batch_size: int = 4
    learning_rate: float = 1.5e-3
    seed: int = 0


RECIPE = Recipe()
