"""The launches of a layer's block: router and experts, or a dense MLP.

T rows, R rows that kernels are compiled for, K experts of a row, H hidden, I intermediate, E experts.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from offload_moe.card.frame import Added, Frame
from offload_moe.card.launches import launch
from offload_moe.card.linears import (
    Inputs,
    add_linears,
    card_matrix,
    input_codec,
    inputs_array,
    kernel_codec,
    out_features,
)
from offload_moe.card.mlp import Mlp
from offload_moe.card.nodes import Node, Nodes
from offload_moe.card.norms import norm_at
from offload_moe.card.structs import struct
from offload_moe.decode.dense import number_linear
from offload_moe.experts.native import NativeArithmetic
from offload_moe.families.layer_reference import tensor_at
from offload_moe.families.layer_spec import LayerSpec, RouterSpec

SCORINGS = {"softmax": "SOFTMAX", "sigmoid": "SIGMOID", "sparsemixer": "MIXER"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of one layer. layer: its number in the decoder. log: the address of its part of the log."""

    arithmetic: NativeArithmetic
    num_experts: int
    first_key: int
    record_bytes: int
    layer: int
    log: int


@dataclass(slots=True)
class RoutedBlock:
    """What a layer with experts launches behind its router, and the numbers that a pass needs of it."""

    experts: Nodes
    hits: Nodes
    resolve: Node
    take: Node
    top_k: int
    stride: int
    scales_inputs: bool


def add_dense(nodes: Nodes, frame: Frame, layer: nn.Module, spec: LayerSpec, added: Added) -> Added:
    """The norm and the MLP of a layer without experts. Returns what it adds. Raises: DevicePassUnavailable."""
    assert spec.dense is not None
    mlp = Mlp(layer, spec.dense)
    inputs = frame.inputs("block", mlp.codecs, frame.hidden)
    normed = frame.floats("normed", frame.hidden) if mlp.is_plain else 0
    _add_norm(nodes, frame, layer, spec, added, inputs, normed)
    out = frame.floats("dense out", frame.hidden)
    mlp.add(nodes, frame, inputs, normed, out=out, stride=1, shares=0)
    return Added(address=out, num_parts=1, from_zero=False, scale=spec.residual_scale)


def add_routed(
    nodes: Nodes, frame: Frame, layer: nn.Module, spec: LayerSpec, experts: Experts, added: Added
) -> tuple[RoutedBlock, Added]:
    """The norm and the router at the end of `nodes`, and what comes behind. Raises: DevicePassUnavailable."""
    assert spec.router is not None
    top_k, shared = spec.router.top_k, None if spec.shared is None else Mlp(layer, spec.shared)
    stride = top_k + (shared is not None)
    codec = input_codec(experts.arithmetic.kernel.codec)
    own = set() if spec.router.scales_inputs else {codec}
    inputs = frame.inputs("block", own | (shared.codecs if shared else set()), frame.hidden)
    normed = frame.floats("normed", frame.hidden)
    shares = _add_norm(nodes, frame, layer, spec, added, inputs, normed)
    ids, weights = _add_router(nodes, frame, layer, spec.router, normed)
    x = _add_scaled(nodes, frame, experts, top_k, normed, weights) if spec.router.scales_inputs else inputs[codec]
    maker = _Maker(frame, experts, x, ids, weights, top_k, stride, are_scaled=spec.router.scales_inputs)
    resolve_at = nodes.add("om_resolve", maker.resolve_params(normed), threads=launch("OM_RESOLVE_THREADS"), grid=(1,))
    queued, hits = Nodes(), Nodes()
    maker.add_experts(queued, maker.hits, "hits", after=())
    maker.add_late(queued)
    maker.add_experts(hits, maker.hits, "hits", after=())
    if shared is not None:
        for graph in (queued, hits):
            out = maker.pairs + 4 * top_k * frame.hidden
            shared.add(graph, frame, inputs, normed, out=out, stride=stride, shares=shares, after=())
    block = RoutedBlock(
        experts=queued,
        hits=hits,
        resolve=nodes.nodes[resolve_at],
        take=maker.take(),
        top_k=top_k,
        stride=stride,
        scales_inputs=spec.router.scales_inputs,
    )
    return block, Added(address=maker.pairs, num_parts=stride, from_zero=True, scale=spec.residual_scale)


def _add_norm(
    nodes: Nodes, frame: Frame, layer: nn.Module, spec: LayerSpec, added: Added, inputs: Inputs, normed: int = 0
) -> int:
    """The norm before the block. Returns where the shares of a shared expert are, 0 without a gate."""
    assert spec.before_mlp is not None
    gate = spec.shared.scale_gate if spec.shared is not None else ""
    shares = frame.floats("shares", 1) if gate else 0
    frame.add_norm(
        nodes,
        norm=norm_at(layer, spec.before_mlp, frame.hidden),
        added=added,
        inputs=inputs,
        normed=normed,
        gate=frame.keeper.numbers(tensor_at(layer, f"{gate}.weight")) if gate else 0,
        shares=shares,
    )
    return shares


def _add_router(nodes: Nodes, frame: Frame, layer: nn.Module, spec: RouterSpec, normed: int) -> tuple[int, int]:
    """Logits and choice. Returns where ids and weights are."""
    bias = tensor_at(layer, spec.bias) if spec.bias else None
    linear = number_linear(tensor_at(layer, spec.weight).detach(), bias)
    num_experts, top_k = out_features(linear), spec.top_k
    logits = frame.floats("logits", num_experts)
    add_linears(
        nodes,
        frame.program,
        frame.keeper,
        [(linear, logits)],
        state=frame.base,
        inputs={},
        x=normed,
        rows=frame.rows,
    )
    ids, weights = frame.floats("ids", top_k), frame.floats("routing weights", top_k)
    correction = tensor_at(layer, spec.correction).flatten() if spec.correction else None
    params = struct("route_params")(
        **{"pass": frame.base},
        logits=logits,
        correction=frame.keeper.numbers(correction),
        ids=ids,
        weights=weights,
        scale=spec.scale,
        jitter=spec.jitter,
    )
    kernel = frame.program.kernel(
        "ROUTE",
        num_experts,
        top_k,
        spec.num_groups,
        spec.num_chosen_groups,
        1 if spec.group_score == "max" else 2,
        f"OM_{SCORINGS[spec.scoring]}",
        int(spec.is_normalized),
    )
    nodes.add(kernel, params, threads=launch("OM_ROUTE_THREADS"), grid=(frame.rows,))
    return ids, weights


def _add_scaled(nodes: Nodes, frame: Frame, experts: Experts, top_k: int, normed: int, weights: int) -> Any:
    """Behind a router that scales the inputs of experts: a row for each pair. Returns where they are."""
    codec = input_codec(experts.arithmetic.kernel.codec)
    x = frame.scratch.input(f"scaled {codec}", frame.rows * top_k, frame.hidden)
    params = struct("scale_params")(
        **{"pass": frame.base},
        x=normed,
        weights=weights,
        inputs=inputs_array({codec: x}),
        weight_scale=experts.arithmetic.pair_scale,
        top_k=top_k,
    )
    grid = (launch("OM_QUANTIZE_BLOCKS", frame.hidden), frame.rows * top_k)
    nodes.add(frame.program.kernel("SCALE", frame.hidden), params, threads=launch("OM_QUANTIZE_THREADS"), grid=grid)
    return x


class _Maker:
    """Launches behind a router."""

    def __init__(
        self,
        frame: Frame,
        experts: Experts,
        x: Any,
        ids: int,
        weights: int,
        top_k: int,
        stride: int,
        *,
        are_scaled: bool,
    ) -> None:
        """x: of each row, or of each pair where those are scaled."""
        self.frame, self.experts, self.x, self.ids, self.weights = frame, experts, x, ids, weights
        self.are_scaled = are_scaled
        self.top_k, self.stride, self.num_pairs = top_k, stride, frame.rows * top_k
        scratch = frame.scratch
        self.hits, self.fetched = (scratch.addresses(name, self.num_pairs) for name in ("hits", "fetched"))
        self.fetches = scratch.of("fetches", "fetches")
        self.pairs = scratch.floats("pairs", frame.rows, stride, frame.hidden)
        self.numbers = {
            "first_key": experts.first_key,
            "layer": experts.layer,
            "num_layers": frame.num_layers,
            "top_k": top_k,
            "max_rows": frame.rows,
        }

    def resolve_params(self, normed: int) -> Any:
        frame = self.frame
        return struct("resolve_params")(
            **{"pass": frame.base},
            state=frame.state,
            tables=frame.tables,
            ids=self.ids,
            weights=self.weights,
            hits=self.hits,
            log=self.experts.log,
            notice=frame.notice,
            normed=normed,
            host_normed=frame.host_normed,
            hidden=frame.hidden,
            **self.numbers,
        )

    def add_experts(self, nodes: Nodes, addresses: int, name: str, after: tuple[int, ...] | None) -> int:
        """Both matrices of the experts at these addresses."""
        frame, kernel = self.frame, self.experts.arithmetic.kernel
        moe, activation = kernel.struct, f"OM_{kernel.activation.upper()}"
        codecs = [kernel_codec(matrix, "experts") for matrix in (moe.first, moe.second)]
        inner = moe.second.cols
        hidden = frame.scratch.input(f"expert {name}", self.num_pairs, inner)
        first = struct("first_params")(
            **{"pass": frame.base},
            input=self.x,
            matrix=card_matrix(moe.first),
            up=card_matrix(moe.up),
            addresses=addresses,
            hidden=hidden,
            alpha=moe.alpha,
            limit=moe.limit,
            top_k=self.top_k,
            pairs_of_input=1 if self.are_scaled else self.top_k,
        )
        rows, has_gate = frame.rows, int(moe.has_gate)
        nodes.add(
            frame.program.kernel("FIRST", codecs[0], frame.hidden, inner, rows, activation, has_gate),
            first,
            threads=launch("OM_FIRST_THREADS", moe.first.codec, frame.hidden, rows, has_gate),
            grid=(launch("OM_FIRST_BLOCKS", inner), self.num_pairs),
            after=after,
        )
        second = struct("second_params")(
            **{"pass": frame.base},
            hidden=hidden,
            matrix=card_matrix(moe.second),
            addresses=addresses,
            ids=self.ids,
            weights=0 if self.are_scaled else self.weights,
            pairs=self.pairs,
            weight_scale=self.experts.arithmetic.pair_scale,
            top_k=self.top_k,
            stride=self.stride,
        )
        return nodes.add(
            frame.program.kernel("SECOND", codecs[1], inner, frame.hidden, rows),
            second,
            threads=launch("OM_SECOND_THREADS", moe.second.codec, inner, rows),
            grid=(launch("OM_SECOND_BLOCKS", moe.second.codec, frame.hidden, inner), self.num_pairs),
        )

    def add_late(self, nodes: Nodes) -> None:
        """Beside the hits: slots for what is missing, its records, and its experts."""
        frame = self.frame
        admit = struct("admit_params")(
            **{"pass": frame.base},
            state=frame.state,
            tables=frame.tables,
            ids=self.ids,
            hits=self.hits,
            fetched=self.fetched,
            fetches=self.fetches,
            log=self.experts.log,
            **self.numbers,
        )
        nodes.add("om_admit", admit, threads=launch("OM_ADMIT_THREADS"), grid=(1,), after=())
        fetch = struct("fetch_params")(
            **{"pass": frame.base}, fetches=self.fetches, record_bytes=self.experts.record_bytes
        )
        grid = (launch("OM_FETCH_BLOCKS"), self.num_pairs)
        nodes.add("om_fetch", fetch, threads=launch("OM_FETCH_THREADS"), grid=grid)
        self.add_experts(nodes, self.fetched, "late", after=None)

    def take(self) -> Node:
        """The host's rows."""
        frame = self.frame
        params = struct("take_params")(
            **{"pass": frame.base},
            ids=self.ids,
            hits=self.hits,
            host_pairs=frame.host_pairs,
            pairs=self.pairs,
            top_k=self.top_k,
            stride=self.stride,
            hidden=frame.hidden,
        )
        return Node(kernel="om_take", params=params, threads=launch("OM_TAKE_THREADS"), grid=(self.num_pairs, 1))
