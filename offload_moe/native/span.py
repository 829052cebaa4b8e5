"""Decode steps of consecutive decoder layers on a native thread, which fetches missing experts or reports them.

T rows, H hidden, E experts per layer, K top-k, L layers of the span that have experts.
"""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.constants import MAX_ROWS, MAX_TOP_K, UNDER_WAY
from offload_moe.native.experts import ExpertKernel
from offload_moe.native.layer import LayerKernel
from offload_moe.native.mlp import MlpKernel
from offload_moe.native.reads import POLL_S, Reads
from offload_moe.native.rooms import Room, rooms_array
from offload_moe.native.slot_table import SlotTable
from offload_moe.native.structs import SharedStruct, SpanLayerStruct, SpanRowsStruct, SpanStruct


class SharedKernel:
    """A shared expert, in fp32."""

    def __init__(self, mlp: MlpKernel, gate: Tensor | None) -> None:
        """gate: fp32 ``[H]``, contiguous; the sigmoid of its product with a token scales the expert's result."""
        self._owned = (mlp, gate)
        self._struct = SharedStruct(
            mlp=mlp.struct_address, gate=None if gate is None else gate.data_ptr(), hidden=mlp.hidden
        )
        self.struct_address = ctypes.addressof(self._struct)
        self._hidden = mlp.hidden
        self._native = library().om_add_shared

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add the expert's results to `out`. x, out ``[T, H]``: contiguous, not checked. Raises: MemoryError."""
        if self._native(self.struct_address, x.data_ptr(), x.numel() // self._hidden, out.data_ptr()):
            raise MemoryError("No memory for the activations of a shared expert.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLayer:
    """A layer with a router and its experts, or a dense one with its MLP.

    first_key: the key of its first expert in the slot table. scales_inputs: weights multiply what the experts are
    given, not what they give.
    """

    step: LayerKernel
    experts: ExpertKernel | None = None
    dense: MlpKernel | None = None
    shared: SharedKernel | None = None
    first_key: int = 0
    weight_scale: float = 1.0
    scales_inputs: bool = False


class SpanRows:
    """Inputs and results of T rows: hidden states ``[T, H]``, and the results of every router.

    Rows are tokens of one sequence, one after the other, or of several sequences.

    logits ``[L, T, E]``, weights ``[L, T, K]`` fp32, ids ``[L, T, K]`` int64. times ``[L, 2]`` fp64: seconds since the
    start when a layer's experts began and ended. stalls ``[L]`` fp64: seconds of waiting for its experts.
    guesses ``[L, A, K]``: ids that the routers of the A next layers chose for the residual of the last row.
    found ``[L, T, K]``, guesses_found ``[L, A, K]`` uint8: HIT, ARRIVING, MISSING or, of guesses, FETCHED.
    """

    def __init__(
        self,
        x: Tensor,
        rooms: "Sequence[Sequence[Room]] | array[int]",
        rotary: tuple[Tensor, Tensor],
        *,
        num_experts: int,
        top_k: int,
        num_layers: int | None = None,
        ranks: Sequence[int] = (),
    ) -> None:
        """x: fp32 of the rows, contiguous, overwritten. rotary: cos and signed sin of each row, contiguous.

        rooms: of each layer, of each of its rows; see `rooms_array`. num_layers: L; None: none is dense.
        ranks ``[A]``: how many of the likeliest guesses are fetched if they are absent, per layer ahead.

        Raises: ConfigError for more than `MAX_ROWS` rows.
        """
        num_layers, num_rows = len(rooms) if num_layers is None else num_layers, x.numel() // x.shape[-1]
        if num_rows > MAX_ROWS:
            raise ConfigError(f"A span of layers takes no more than {MAX_ROWS} rows at once, not {num_rows}.")
        self.num_rows, self.x = num_rows, x
        self.residual, self.normed = torch.empty_like(x), torch.empty_like(x)
        self.logits = torch.empty(num_layers, num_rows, num_experts)
        self.weights = torch.empty(num_layers, num_rows, top_k)
        self._ids = array("q", bytes(8 * num_layers * num_rows * top_k))
        self.ids = torch.frombuffer(self._ids, dtype=torch.int64).view(num_layers, num_rows, top_k)
        self.times = torch.empty(num_layers, 2, dtype=torch.float64)
        self.stalls = torch.empty(num_layers, dtype=torch.float64)
        self.guesses = torch.empty(num_layers, len(ranks), top_k, dtype=torch.int64)
        self._found = bytearray(num_layers * num_rows * top_k)
        self.found = torch.frombuffer(self._found, dtype=torch.uint8).view(num_layers, num_rows, top_k)
        self.guesses_found = torch.zeros(num_layers, len(ranks), top_k, dtype=torch.uint8)
        self._spaces = {
            "pairs": torch.empty(top_k, x.numel()),
            "scaled": torch.empty(top_k, x.numel()),
            "guess_space": torch.empty(x.numel() // num_rows + num_experts + top_k),
        }
        leading = self._ranks = array("q", ranks)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)} | self._spaces
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self.struct = SpanRowsStruct(
            num_rows=num_rows, num_ahead=len(leading), ranks=leading.buffer_info()[0], **addresses
        )
        self.begin(x, rooms, rotary)

    def begin(self, x: Tensor, rooms: "Sequence[Sequence[Room]] | array[int]", rotary: tuple[Tensor, Tensor]) -> None:
        """Take as many other rows next. Their results replace those of the last ones."""
        places = rooms_array(rooms if isinstance(rooms, array) else chain.from_iterable(rooms))
        self.x, struct = x, self.struct
        self._owned: tuple[Any, ...] | None = (rooms, rotary, places)
        struct.x, struct.cos, struct.signed_sin = x.data_ptr(), rotary[0].data_ptr(), rotary[1].data_ptr()
        struct.rooms = places.buffer_info()[0]

    def end(self) -> None:
        """Keep the results, and the caches no longer alive."""
        self._owned = None

    def chosen(self, at: int) -> tuple[list[int], Sequence[int]]:
        """Ids and how they were found of all rows of a layer, ``[T * K]``."""
        count = self.num_rows * self.ids.shape[2]
        choices = slice(at * count, (at + 1) * count)
        return self._ids[choices].tolist(), self._found[choices]

    @cached_property
    def routed(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Logits ``[T, E]``, weights and ids ``[T, K]`` of each layer."""
        return list(zip(self.logits.unbind(), self.weights.unbind(), self.ids.unbind(), strict=True))


class SpanKernel:
    """Consecutive layers that one call or one thread takes some rows through."""

    def __init__(self, layers: Sequence[SpanLayer], *, hidden: int, num_experts: int, top_k: int) -> None:
        """num_experts, top_k: of every layer that has experts. Raises: ConfigError."""
        if top_k > MAX_TOP_K:
            raise ConfigError(f"A span of layers takes no more than {MAX_TOP_K} experts per token, not {top_k}.")
        self._layers = layers
        self._structs = (SpanLayerStruct * len(layers))(
            *(
                SpanLayerStruct(
                    layer=layer.step.struct_address,
                    experts=None if layer.experts is None else layer.experts.struct_address,
                    dense=None if layer.dense is None else layer.dense.struct_address,
                    shared=None if layer.shared is None else layer.shared.struct_address,
                    first_key=layer.first_key,
                    weight_scale=layer.weight_scale,
                    scales_inputs=layer.scales_inputs,
                )
                for layer in layers
            )
        )
        self._with_experts = array("q", [at for at, layer in enumerate(layers) if layer.experts is not None])
        self._struct = SpanStruct(
            layers=ctypes.addressof(self._structs),
            num_layers=len(layers),
            hidden=hidden,
            with_experts=self._with_experts.buffer_info()[0],
            num_with_experts=len(self._with_experts),
            num_experts=num_experts,
            top_k=top_k,
        )

    def pass_through(self, rows: SpanRows, slot_table: SlotTable) -> None:
        """Take the rows through the layers, all experts of which are resident and held. Raises: MemoryError."""
        structs = (ctypes.addressof(self._struct), ctypes.addressof(rows.struct))
        if library().om_span_pass(*structs, slot_table.handle) < 0:
            raise MemoryError("No memory for the activations of a decode step.")

    def start(self, rows: SpanRows, slot_table: SlotTable, reads: Reads | None = None) -> "TokenPass":
        """Send the rows through the layers on a thread of its own. The token pass must end before anything it uses.

        reads: fetches missing experts while it has slots; None: all missing experts are needs. Raises: MemoryError.
        """
        structs = (ctypes.addressof(self._struct), ctypes.addressof(rows.struct))
        handle = library().om_pass_start(*structs, slot_table.handle, None if reads is None else reads.handle)
        if not handle:
            raise MemoryError("No memory for a thread that runs a decode step.")
        return TokenPass(handle, (self, rows, slot_table, reads))


class TokenPass:
    """Rows on their way through a span. A context manager: leaving it early stops the pass."""

    def __init__(self, handle: int, owned: tuple[Any, ...]) -> None:
        self._handle = handle
        self._owned = owned
        self._next = library().om_pass_next
        self._needs = ctypes.c_int32()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        library().om_pass_end(self._handle)

    def next(self, first: int) -> tuple[int, int] | None:
        """Wait for the first layer from `first` on with a need. Returns the layer and the need, each need once.

        NEEDS_EXPERTS: the pass continues once the experts that the layer chose are resident. NEEDS_SLOTS: its reads
        need reserved slots. Layers before the returned one are done; at the end it is the number of layers. None after
        `POLL_S` seconds without a need. Raises: MemoryError.
        """
        at: int = self._next(self._handle, first, POLL_S, ctypes.addressof(self._needs))
        if at == UNDER_WAY:
            return None
        if at < 0:
            raise MemoryError("No memory for the activations of a decode step.")
        return at, self._needs.value
