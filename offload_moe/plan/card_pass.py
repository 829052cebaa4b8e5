"""The device pass of a model: launches per layer, and the memory of its graphs and buffers on the card.

Counted from layer specs as `offload_moe.card` describes them, before any weight is there. R rows of a pass, K experts
of a row, H hidden.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from offload_moe.card.memory import ALIGNMENT
from offload_moe.card.model import why_not
from offload_moe.card.passes import ROWS
from offload_moe.card.structs import constant, struct
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.families.layer_spec import AttentionSpec, LayerSpec
from offload_moe.families.read_layer import layer_spec
from offload_moe.families.text_model import TextModel
from offload_moe.native.constants import MAX_ROWS
from offload_moe.plan.attention_work import out_features

GRAPH_NODE_BYTES = 16 << 10  # of the card's memory, for one launch in an executable graph: assumed, never measured
NODES_OF_ENDS = 6  # of a token: embedding; last norm, head, greatest logits, choice, end of the pass
NODES_BESIDE_LAYERS = 13  # of all graphs: that, the ends of passes that give logits or less, the choice alone
NUM_BUFFERS = 40  # each begins at a multiple of `ALIGNMENT`
FLOAT, ADDRESS, INT = 4, 8, 4
ATTENTION_NODES = 6  # norm, projections, heads, sections, merge, output
DELTA_NODES = 5  # norm, projections, those of strengths and times, which are not quantized, rule, output
ROUTER_NODES = 4  # norm, logits, choice, resolve
EXPERT_NODES, FETCH_NODES, MLP_NODES = 2, 2, 2  # both matrices; slots and records


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """What the device pass launches and keeps.

    Nodes are of all layers together: attend_nodes up to the router; hit_nodes behind it, for what is on the card;
    late_nodes beside them, for what is missing. row_bytes: buffers of one row that graphs were made for; log_bytes: its
    log. kept_bytes: what each number of rows takes beside them, with numbers in fp32. position_bytes: tables of angles
    and lists of pages, by position. section_bytes: of one section of the context, all rows.
    """

    attend_nodes: int
    hit_nodes: int
    late_nodes: int
    row_bytes: int
    kept_bytes: int
    position_bytes: int
    section_bytes: int
    log_bytes: int

    @property
    def queued_nodes(self) -> int:
        """Launches of a token whose misses the card fetches."""
        return self.attend_nodes + self.hit_nodes + self.late_nodes

    @property
    def stepwise_nodes(self) -> int:
        """Launches of a token whose misses the CPU computes."""
        return self.attend_nodes + self.hit_nodes

    @property
    def graph_nodes(self) -> int:
        """Nodes of all graphs, for every number of rows."""
        return len(ROWS) * (self.queued_nodes + self.hit_nodes + NODES_BESIDE_LAYERS)

    def buffer_bytes(self, context: int, num_experts: int) -> int:
        """Device memory beside graphs, weights and slots, with graphs for every number of rows.

        num_experts: of all layers; each may have a slot.
        """
        sections = -(-context // constant("OM_CARD_SECTION"))
        tables = num_experts * (2 * ADDRESS + 3 * ADDRESS)  # by key, and by slot
        rows = sum(ROWS) * (self.row_bytes + self.log_bytes) + len(ROWS) * self.kept_bytes
        return rows + context * self.position_bytes + sections * self.section_bytes + tables


def describe_pass(model: TextModel, experts: Sequence[ExpertsModule]) -> PassShape | str:
    """The device pass of a skeleton with these experts, or why there is none."""
    if reason := why_not(model):
        return reason
    num_experts = max(found.num_experts for found in experts)
    inner = max(found.shape.matrices[-1].in_features for found in experts)
    layers = [_Layer(module, num_experts, inner) for module in model.get_decoder().layers]
    return PassShape(
        attend_nodes=sum(layer.attend_nodes for layer in layers),
        hit_nodes=sum(layer.hit_nodes for layer in layers),
        late_nodes=sum(layer.late_nodes for layer in layers),
        row_bytes=max(layer.row_bytes for layer in layers) + FLOAT * model.config.get_text_config().vocab_size,
        kept_bytes=sum(layer.kept_bytes for layer in layers)
        + ctypes.sizeof(struct("fetches"))
        + NUM_BUFFERS * ALIGNMENT,
        position_bytes=max(layer.angle_bytes for layer in layers)
        + -(-2 * ADDRESS * len(layers) // constant("OM_CARD_PAGE")),
        section_bytes=max(layer.section_bytes for layer in layers),
        log_bytes=len(layers) * max(layer.log_bytes for layer in layers),
    )


class _Layer:
    """One layer: its launches, and bytes of one row."""

    def __init__(self, module: nn.Module, num_experts: int, inner: int) -> None:
        """num_experts, inner: of the largest block of experts; inner: its intermediate features."""
        spec = layer_spec(module)
        assert spec is not None
        self.spec: LayerSpec = spec
        self._attention: AttentionSpec = spec.attention
        attention: Any = module.get_submodule(spec.attention.path)
        output: Any = attention.get_submodule(spec.attention.output_name)
        self._hidden, self._width = int(output.out_features), int(output.in_features)
        self._keys = out_features(attention, "k_proj")
        self._top_k = spec.router.top_k if spec.router is not None else 0
        self._num_experts, self._inner = num_experts, inner
        self._mlp = max((_width_of(module, mlp.gate) for mlp in (spec.shared, spec.dense) if mlp), default=0)

    @property
    def attend_nodes(self) -> int:
        if self.spec.router is None:
            return self._attention_nodes + 1 + MLP_NODES
        return self._attention_nodes + ROUTER_NODES + int(self.spec.router.scales_inputs)

    @property
    def _attention_nodes(self) -> int:
        if self._attention.delta is not None:
            return DELTA_NODES
        latent = self._attention.latent
        # Latents: two projections for the query with a norm between them, or two codecs of the first projections.
        return ATTENTION_NODES + (0 if latent is None else 2 if latent.query_rank else 1)

    @property
    def hit_nodes(self) -> int:
        return (EXPERT_NODES + (MLP_NODES if self.spec.shared else 0)) if self.spec.router else 0

    @property
    def late_nodes(self) -> int:
        return FETCH_NODES + EXPERT_NODES if self.spec.router else 0

    @property
    def row_bytes(self) -> int:
        """Activations in fp32 and in int8, the choice, and each expert's result."""
        hidden, pairs = self._hidden, self._top_k
        floats = 6 * hidden + self._heads() + self._width + self._num_experts + 2 * pairs + (pairs + 1) * hidden
        quantized = 3 * hidden + self._width + self._mlp + 2 * pairs * self._inner
        quantized += pairs * hidden if self.spec.router and self.spec.router.scales_inputs else 0
        return FLOAT * floats + quantized + quantized // 8 + 2 * ADDRESS * pairs

    @property
    def kept_bytes(self) -> int:
        """Weights of norms and of a convolution, and a router's correction."""
        delta = self._attention.delta
        taps = 0 if delta is None else (delta.num_taps + 1) * self._channels + delta.value_dims
        return FLOAT * (2 * self._hidden + 2 * self._attention.head_dim + self._num_experts + taps)

    @property
    def angle_bytes(self) -> int:
        return 2 * FLOAT * self._attention.rotated_dims

    @property
    def section_bytes(self) -> int:
        if self._attention.delta is not None:
            return 0
        latent = self._attention.latent
        width = self._attention.head_dim if latent is None else latent.key_value_rank
        return MAX_ROWS * self._attention.num_heads * (2 * FLOAT + FLOAT * width)

    @property
    def log_bytes(self) -> int:
        return INT * (constant("OM_CARD_LOG_HEAD") + 6 * self._top_k)

    @property
    def _channels(self) -> int:
        """Of the convolution of a delta rule."""
        spec, delta = self._attention, self._attention.delta
        assert delta is not None
        return 2 * delta.num_key_heads * spec.head_dim + spec.num_heads * delta.value_dims

    def _heads(self) -> int:
        """Numbers of queries, keys and values, before and after rotation; of a delta rule, its projections."""
        spec, latent = self._attention, self._attention.latent
        if spec.delta is not None:
            return self._channels + self._width + 2 * spec.num_heads
        queries = spec.num_heads * spec.head_dim
        if latent is None:
            return (3 if spec.is_query_gated else 2) * queries + 2 * self._keys
        compressed = latent.key_value_rank + spec.rotated_dims
        return queries + 2 * latent.query_rank + compressed + spec.num_heads * compressed


def _width_of(module: nn.Module, path: str) -> int:
    linear: Any = module.get_submodule(path)
    return int(linear.out_features)
