"""What a decoder layer computes, as values, which the kernels, the reference and the reports read.

Paths are module or tensor names below the layer. An empty path: the layer has no such part.
"""

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid", "sparsemixer"]
GroupScore = Literal["max", "best two"]
NormSpan = Literal["none", "head", "all heads"]
Rotary = Literal["halves", "pairs", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """``x / rms(x) * weight``; is_centered: a layer norm, whose mean is removed and which has a bias.

    has_weight: False is ``x / rms(x)``. is_from_one: the weights that count are ``1 + weight``.
    """

    path: str
    epsilon: float
    is_centered: bool = False
    is_from_one: bool = False
    has_weight: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """Scores of all experts, the greatest K of them, and their weights.

    path: the module that returns logits, weights and ids. weight, bias: tensors of the logits. correction: a tensor
    added to the scores for the choice only. num_groups, num_chosen_groups: experts outside the best groups are not
    chosen.
    is_normalized: weights are divided by their sum; a softmax of the chosen logits is a normalized softmax of all.
    scale: weights are multiplied by it afterwards. jitter: sparsemixer's, see its paper (arXiv:2409.12136).
    scales_inputs: weights multiply what the experts are given, not what they give.
    """

    path: str
    weight: str
    top_k: int
    scoring: Scoring
    is_normalized: bool
    bias: str = ""
    correction: str = ""
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_score: GroupScore = "best two"
    scale: float = 1.0
    jitter: float = 0.0
    scales_inputs: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it takes the greatest of a softmax, without corrections, groups that exclude experts, or a scale."""
        has_groups = self.num_chosen_groups < self.num_groups
        return self.scoring == "softmax" and not self.correction and not has_groups and self.scale == 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention: ranks of the latents (query 0: none), dims of an unrotated key and of a value."""

    query_rank: int
    key_value_rank: int
    unrotated_dims: int
    value_dims: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSpec:
    """Linear attention by a gated delta rule (arXiv:2412.06464), behind a convolution of so many taps.

    num_key_heads: each is shared by as many heads of values. norm: of a head's output, which a gate then multiplies.
    is_joined: one projection gives queries, keys, values and gates by heads of keys, one strengths and times.
    """

    num_key_heads: int
    value_dims: int
    num_taps: int
    norm: NormSpec
    is_joined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryScale:
    """Queries are multiplied by ``1 + strength * log(1 + floor((position + 1) / step))``.

    Source: "Scalable-Softmax Is Superior for Attention" (arXiv:2501.19399), as Llama 4 has it.
    """

    step: float
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Softmax attention. latent: None for grouped queries. delta: linear attention instead, of `num_heads` of values.

    head_dim: of a query and a key. rotated_dims: the first ones of a head, of latent attention the last ones.
    norm_span: what the norms of queries and keys extend over; is_normed_rotated: they come after the rotation.
    sliding_window: None sees all. chunk: positions are cut into chunks of so many, and a token sees its own alone.
    query_scale: None leaves queries as they are. sinks: a logit per head that takes a share and gives nothing. clip:
    queries, keys and values are clamped. keeps_pairs: dims that turn as pairs stay pairs; otherwise they are halves
    from then on. gate: a projection whose sigmoid the heads' outputs are multiplied by. is_query_gated: the query's
    projection gives, of each head, its query and then such a gate.
    """

    path: str
    num_heads: int
    head_dim: int
    scaling: float
    rotary: Rotary
    rotated_dims: int
    keeps_pairs: bool = False
    latent: LatentSpec | None = None
    delta: DeltaSpec | None = None
    norm_span: NormSpan = "none"
    query_norm: NormSpec | None = None
    key_norm: NormSpec | None = None
    is_normed_rotated: bool = False
    has_bias: bool = False
    has_output_bias: bool = False
    sliding_window: int | None = None
    chunk: int | None = None
    query_scale: QueryScale | None = None
    sinks: str = ""
    clip: float | None = None
    gate: str = ""
    is_query_gated: bool = False

    @property
    def output_name(self) -> str:
        """The module's output projection."""
        return "o_proj" if self.delta is None else "out_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """``down(activation(gate(x)) * up(x))``. scale_gate: a linear whose sigmoid the result is multiplied by."""

    gate: str
    up: str
    down: str
    activation: str
    scale_gate: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """``x += scale * after(attention(before(x)))``, then likewise with ``experts + shared``, or with a dense MLP.

    A norm that is None is not there. A layer has a router and experts, or a dense MLP.
    """

    attention: AttentionSpec
    before_attention: NormSpec | None
    after_attention: NormSpec | None
    before_mlp: NormSpec | None
    after_mlp: NormSpec | None
    residual_scale: float
    router: RouterSpec | None
    experts: str
    shared: MLPSpec | None
    dense: MLPSpec | None

    @property
    def bound_path(self) -> str:
        """The module whose forward is bound to the experts: their block, where it scales their inputs."""
        is_block = self.router is not None and self.router.scales_inputs
        return self.experts.rpartition(".")[0] if is_block else self.experts
