"""The numbers that decide what the demo model is. Changing one changes the name of its cache folder."""

import hashlib
from dataclasses import asdict, dataclass

from offload_moe.demo.corpus import corpus_bytes
from offload_moe.demo.source import WHEEL_SHA256

# Raise it when the code that builds the model changes what it builds.
_REVISION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a dense feed-forward layer is split and calibrated.

    The first `num_dense_layers` layers stay whole. In the others `num_shared` neurons form the shared expert and the
    rest form `num_experts` experts of equal size, `top_k` of which run for a token. Calibration reads `num_sequences`
    sequences of `num_positions` tokens of text and `num_vocabulary` more of tokens drawn from the whole vocabulary,
    which count `vocabulary_weight`: the text has few rare words, and the first layers know words rather than contexts.
    Clustering looks at `num_cluster_tokens` tokens.
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
    seed: int = 0

    def digest(self) -> str:
        """Eight hexadecimal digits that stand for this recipe, its text and its source."""
        text = repr((_REVISION, sorted(asdict(self).items()), WHEEL_SHA256))
        return hashlib.sha256(text.encode() + corpus_bytes()).hexdigest()[:8]


RECIPE = Recipe()
