"""The launches of a layer's attention, from its norm to its output projection.

N query heads, M key/value heads, D head dim; latent attention: K unrotated, P rotated and V value dims, Z rank.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from offload_moe.card.frame import Added, Frame
from offload_moe.card.launches import launch
from offload_moe.card.linears import (
    Inputs,
    add_linears,
    codecs_of,
    inputs_array,
    linear_of,
    out_features,
    plain_weight,
)
from offload_moe.card.nodes import Nodes
from offload_moe.card.norms import norm_at
from offload_moe.card.structs import struct
from offload_moe.decode.step import rotation_of
from offload_moe.families.layer_spec import AttentionSpec, LayerSpec
from offload_moe.native.kernels import Linear

NORM_SPANS = {"none": "OM_NO_NORM", "head": "OM_NORM_OF_HEAD", "all heads": "OM_NORM_OF_ALL"}
BLOCKS_PER_PROCESSOR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a layer attends to, in device memory: addresses of its rooms, angles and sums.

    processors: of the card. states: of linear attention, `om_card_states`, 0 elsewhere.
    """

    rooms: int
    states: int
    cos: int
    signed_sin: int
    attended: int
    processors: int


def add_attention(
    nodes: Nodes, frame: Frame, layer: nn.Module, spec: LayerSpec, seen: Seen, added: Added | None
) -> Added:
    """Norm, projections, heads, attention, output. Returns what it adds. Raises: DevicePassUnavailable."""
    part = _Latent if spec.attention.latent is not None else _Grouped
    return part(nodes, frame, layer, spec, seen).add_all(added)


class Attention:
    """What all kinds share."""

    def __init__(self, nodes: Nodes, frame: Frame, layer: nn.Module, spec: LayerSpec, seen: Seen) -> None:
        assert spec.before_attention is not None
        self.nodes, self.frame, self.layer, self.seen = nodes, frame, layer, seen
        self.norm, self.spec, self.residual_scale = spec.before_attention, spec.attention, spec.residual_scale
        self.module: Any = layer.get_submodule(spec.attention.path)
        output: nn.Module = self.module.get_submodule(self.spec.output_name)
        self.output = linear_of(output)
        self.width = self.output.shape.matrices[0].in_features
        self.out_inputs = frame.inputs("attended", codecs_of([self.output]), self.width)
        self.out_x = 0 if self.out_inputs else frame.floats("attended", self.width)

    def add_all(self, added: Added | None) -> Added:
        """Every launch. Returns what the layer's attention adds."""
        self.project(added)
        self.attend()
        out = self.frame.floats("attention out", self.frame.hidden)
        self.put_out(out)
        return Added(address=out, num_parts=1, from_zero=False, scale=self.residual_scale)

    def project(self, added: Added | None) -> None:
        """From the layer's norm to what heads attend with."""
        raise NotImplementedError

    def attend(self) -> None:
        """Up to the input of the output projection."""
        raise NotImplementedError

    def add(self, kernel: str, params: Any, threads: str, grid: tuple[int, ...]) -> None:
        self.nodes.add(kernel, params, threads=launch(threads), grid=grid)

    def add_first(self, linears: list[tuple[Linear, int]], added: Added | None) -> None:
        """The layer's norm, and the projections of what it gives."""
        frame, codecs = self.frame, codecs_of(linear for linear, _ in linears)
        inputs = frame.inputs("hidden", codecs, frame.hidden)
        is_plain = any(linear.codec not in codecs for linear, _ in linears)
        normed = frame.floats("normed", frame.hidden) if is_plain else 0
        norm = norm_at(self.layer, self.norm, frame.hidden)
        frame.add_norm(self.nodes, norm=norm, added=added, inputs=inputs, normed=normed)
        self.add_projections(linears, inputs, normed)

    def add_projections(self, linears: list[tuple[Linear, int]], inputs: Inputs, x: int) -> None:
        frame = self.frame
        add_linears(
            self.nodes, frame.program, frame.keeper, linears, state=frame.base, inputs=inputs, x=x, rows=frame.rows
        )

    @property
    def view(self) -> Any:
        window, chunk = self.spec.sliding_window or 0, self.spec.chunk or 0
        return struct("view")(rooms=self.seen.rooms, positions=self.frame.positions, window=window, chunk=chunk)

    @property
    def angles(self) -> Any:
        return struct("angles")(cos=self.seen.cos, signed_sin=self.seen.signed_sin)

    def add_sections(self, query: int, sizes: tuple[int, ...]) -> None:
        """Softmax and sums of values.

        sizes: heads, key/value heads and the dims of queries and values, of `OM_DEFINE_ATTEND`.
        """
        frame = self.frame
        params = struct("attend_params")(
            **{"pass": frame.base}, view=self.view, query=query, attended=self.seen.attended, scaling=self.spec.scaling
        )
        kernel = frame.program.kernel("ATTEND", *sizes)
        self.add(kernel, params, "OM_ATTEND_THREADS", (BLOCKS_PER_PROCESSOR * self.seen.processors,))

    def put_out(self, out: int) -> None:
        """The output projection."""
        self.add_projections([(self.output, out)], self.out_inputs, self.out_x)


class _Grouped(Attention):
    """Grouped queries."""

    def project(self, added: Added | None) -> None:
        frame, module = self.frame, self.module
        linears = [linear_of(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj")]
        heads = [frame.floats(f"head {name}", out_features(each)) for name, each in zip("qkv", linears, strict=True)]
        self.add_first(list(zip(linears, heads, strict=True)), added)
        self.dims = self.spec.head_dim
        self.num_heads, self.num_kv_heads = self.width // self.dims, out_features(linears[1]) // self.dims
        self.query = frame.floats("query", self.width)
        self.gates = heads[0] if self.spec.is_query_gated else 0
        params = struct("heads_params")(**{"pass": frame.base}, view=self.view, angles=self.angles, query=self.query)
        params.heads[:] = heads
        params.is_gated = int(self.spec.is_query_gated)
        if self.spec.query_scale is not None:
            params.scale_step, params.scale_strength = self.spec.query_scale.step, self.spec.query_scale.strength
        self._add_norms(params)
        rotated = 0 if self.spec.rotary == "none" else self.spec.rotated_dims
        kernel = frame.program.kernel(
            "HEADS",
            self.num_heads,
            self.num_kv_heads,
            self.dims,
            rotated,
            f"OM_{rotation_of(self.spec).upper()}",
            self._norm_span,
        )
        self.add(kernel, params, "OM_HEADS_THREADS", (self.num_heads + 2 * self.num_kv_heads, frame.rows))

    @property
    def _norm_span(self) -> str:
        is_last = self.spec.is_normed_rotated and self.spec.norm_span == "head"
        return "OM_NORM_OF_ROTATED" if is_last else NORM_SPANS[self.spec.norm_span]

    def _add_norms(self, params: Any) -> None:
        if self.spec.norm_span == "none":
            return
        norms = (self.spec.query_norm, self.num_heads), (self.spec.key_norm, self.num_kv_heads)
        for which, (spec, num_heads) in enumerate(norms):
            assert spec is not None
            columns = self.dims * (num_heads if self.spec.norm_span == "all heads" else 1)
            norm = norm_at(self.layer, spec, columns)
            params.norms[which], params.epsilons[which] = self.frame.keeper.numbers(norm.weight), norm.epsilon

    def attend(self) -> None:
        frame, sinks = self.frame, getattr(self.module, "sinks", None)
        self.add_sections(self.query, (self.num_heads, self.num_kv_heads, self.dims, 0, self.dims))
        params = struct("merge_params")(
            **{"pass": frame.base},
            view=self.view,
            attended=self.seen.attended,
            sinks=frame.keeper.numbers(sinks),
            gates=self.gates,
            out=self.out_x,
            inputs=inputs_array(self.out_inputs),
        )
        kernel = frame.program.kernel("MERGE", self.num_heads, self.dims)
        grid = (launch("OM_MERGE_BLOCKS", self.num_heads, self.dims), frame.rows)
        self.add(kernel, params, "OM_MERGE_THREADS", grid)


class _Latent(Attention):
    """Latents, absorbed."""

    def project(self, added: Added | None) -> None:
        frame, module, latent = self.frame, self.module, self.spec.latent
        assert latent is not None
        assert self.spec.key_norm is not None
        compress = linear_of(module.kv_a_proj_with_mqa)
        first = linear_of(module.q_a_proj if latent.query_rank else module.q_proj)
        compressed = frame.floats("compressed", out_features(compress))
        if latent.query_rank:
            query = self._project_twice(first, compress, compressed, added)
        else:
            query = frame.floats("head q", out_features(first))
            self.add_first([(first, query), (compress, compressed)], added)
        self._absorb(query, compressed)

    def _project_twice(self, first: Linear, compress: Linear, compressed: int, added: Added | None) -> int:
        """The query by two projections with a norm between them."""
        frame = self.frame
        low = frame.floats("low query", out_features(first))
        self.add_first([(first, low), (compress, compressed)], added)
        second = linear_of(self.module.q_b_proj)
        assert self.spec.query_norm is not None
        width, codecs = out_features(first), codecs_of([second])
        inputs = frame.inputs("low query", codecs, width)
        normed = 0 if inputs else frame.floats("low query normed", width)
        frame.add_norm(
            self.nodes,
            norm=norm_at(self.layer, self.spec.query_norm, width),
            added=None,
            inputs=inputs,
            normed=normed,
            x=low,
            columns=width,
        )
        query = frame.floats("head q", out_features(second))
        self.add_projections([(second, query)], inputs, normed)
        return query

    def _absorb(self, heads: int, compressed: int) -> None:
        frame, latent = self.frame, self.spec.latent
        assert latent is not None
        assert self.spec.key_norm is not None
        rank, rotated, num_heads = latent.key_value_rank, self.spec.rotated_dims, self.spec.num_heads
        self.codec, weight = plain_weight(self.module.kv_b_proj)
        self.expansion = frame.keeper.address(weight)
        self.query = frame.floats("query", num_heads * (rank + rotated))
        params = struct("absorb_params")(
            **{"pass": frame.base},
            view=self.view,
            angles=self.angles,
            heads=heads,
            compressed=compressed,
            norm=frame.keeper.numbers(norm_at(self.layer, self.spec.key_norm, rank).weight),
            expansion=self.expansion,
            query=self.query,
            epsilon=self.spec.key_norm.epsilon,
        )
        kernel = frame.program.kernel(
            "ABSORB",
            f"OM_{self.codec.upper()}",
            num_heads,
            latent.unrotated_dims,
            rotated,
            latent.value_dims,
            rank,
            f"OM_{rotation_of(self.spec).upper()}",
            frame.rows,
        )
        grid = (num_heads * launch("OM_ABSORB_BLOCKS", rank) + frame.rows,)
        self.add(kernel, params, "OM_ABSORB_THREADS", grid)

    def attend(self) -> None:
        frame, latent, num_heads = self.frame, self.spec.latent, self.spec.num_heads
        assert latent is not None
        rank = latent.key_value_rank
        self.add_sections(self.query, (num_heads, 1, rank, self.spec.rotated_dims, rank))
        params = struct("expand_params")(
            **{"pass": frame.base},
            view=self.view,
            attended=self.seen.attended,
            expansion=self.expansion,
            out=self.out_x,
            inputs=inputs_array(self.out_inputs),
        )
        kernel = frame.program.kernel(
            "EXPAND",
            f"OM_{self.codec.upper()}",
            num_heads,
            latent.unrotated_dims,
            latent.value_dims,
            rank,
            frame.rows,
        )
        grid = (launch("OM_EXPAND_BLOCKS", num_heads, latent.value_dims),)
        self.add(kernel, params, "OM_EXPAND_THREADS", grid)


def value_width(spec: AttentionSpec) -> int:
    """Numbers that a head's section sums: its values, or latents."""
    return spec.head_dim if spec.latent is None else spec.latent.key_value_rank
