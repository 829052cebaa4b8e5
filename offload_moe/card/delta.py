"""The launches of a layer's linear attention, from its norm to its output projection.

G heads of keys, S heads of values for each, K and V their dims.
"""

from typing import Any

from torch import nn

from offload_moe.card.attention import Attention, Seen
from offload_moe.card.frame import Added, Frame
from offload_moe.card.launches import launch
from offload_moe.card.linears import inputs_array, linear_of, out_features
from offload_moe.card.nodes import Nodes
from offload_moe.card.norms import norm_at
from offload_moe.card.structs import struct
from offload_moe.decode.delta import SILU, numbers_of, projection_names
from offload_moe.errors import DevicePassUnavailable
from offload_moe.families.layer_spec import LayerSpec
from offload_moe.native.delta import FLOAT, places_of


def add_delta(nodes: Nodes, frame: Frame, layer: nn.Module, spec: LayerSpec, seen: Seen, added: Added | None) -> Added:
    """Norm, projections, the rule, output. Returns what it adds. Raises: DevicePassUnavailable."""
    return _Delta(nodes, frame, layer, spec, seen).add_all(added)


class _Delta(Attention):
    """A gated delta rule."""

    def __init__(self, nodes: Nodes, frame: Frame, layer: nn.Module, spec: LayerSpec, seen: Seen) -> None:
        super().__init__(nodes, frame, layer, spec, seen)
        assert self.spec.delta is not None
        self.delta = self.spec.delta
        self.num_shared = self.spec.num_heads // self.delta.num_key_heads
        if self.module.activation not in SILU:
            raise DevicePassUnavailable(f"linear attention with {self.module.activation} has no kernel there")

    def project(self, added: Added | None) -> None:
        linears = [linear_of(getattr(self.module, name)) for name in projection_names(self.module)]
        if any(linear.bias is not None or linear.shape.biases for linear in linears):
            raise DevicePassUnavailable("linear attention whose projections have biases")
        self.widths = [out_features(linear) for linear in linears]
        self.projected = [self.frame.floats(f"delta {n}", width) for n, width in enumerate(self.widths)]
        self.add_first(list(zip(linears, self.projected, strict=True)), added)

    def attend(self) -> None:
        frame, delta, keeper = self.frame, self.delta, self.frame.keeper
        numbers, (reads, leaves) = numbers_of(self.module), frame.moves
        norm = norm_at(self.layer, delta.norm, delta.value_dims)
        params = struct("delta_params")(
            **{"pass": frame.base},
            states=self.seen.states,
            reads=reads,
            leaves=leaves,
            conv_weight=keeper.numbers(numbers.conv_weight),
            conv_bias=keeper.numbers(numbers.conv_bias),
            decays=keeper.numbers(numbers.decays),
            time_biases=keeper.numbers(numbers.time_biases),
            norm=keeper.numbers(norm.weight),
            out=self.out_x,
            inputs=inputs_array(self.out_inputs),
            epsilon=norm.epsilon,
        )
        self._set_places(params)
        width = self.num_shared * delta.value_dims
        kernel = frame.program.kernel(
            "DELTA", delta.num_key_heads, self.num_shared, self.spec.head_dim, delta.value_dims, delta.num_taps
        )
        threads, blocks = launch("OM_DELTA_THREADS", width), launch("OM_DELTA_BLOCKS", delta.num_key_heads, width)
        self.nodes.add(kernel, params, threads=threads, grid=(blocks, frame.rows))

    def _set_places(self, params: Any) -> None:
        """Where the kernel finds queries, keys, values, gates, strengths and times of the first row and of the next."""
        spec, delta = self.spec, self.delta
        places = places_of(
            num_heads=spec.num_heads,
            num_key_heads=delta.num_key_heads,
            key_dim=spec.head_dim,
            value_dim=delta.value_dims,
            is_joined=delta.is_joined,
        )
        for field, (source, offset) in enumerate(zip(places.sources, places.offsets, strict=True)):
            params.projected[field] = self.projected[source] + FLOAT * offset
            params.row_strides[field] = self.widths[source]
        params.head_strides[:] = places.strides
