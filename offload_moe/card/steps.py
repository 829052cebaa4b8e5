"""The graphs of a model for one number of rows, and what native code needs to launch them."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload_moe.card.attention import Seen, add_attention
from offload_moe.card.block import Experts, RoutedBlock, add_dense, add_routed
from offload_moe.card.delta import add_delta
from offload_moe.card.frame import Added, Frame
from offload_moe.card.head import GIVEN, HIDDEN, LOGITS, add_choice, add_end
from offload_moe.card.launches import launch
from offload_moe.card.linears import out_features
from offload_moe.card.memory import Allocate, Scratch
from offload_moe.card.model import DecoderLayer, DecoderParts
from offload_moe.card.nodes import Node, Nodes
from offload_moe.card.program import Compile, Program
from offload_moe.card.structs import struct
from offload_moe.native.session import Session
from offload_moe.native.structs import CardLayerStruct, CardNodeStruct, CardStepsStruct

LOG_INT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Addresses that all numbers of rows have in common.

    state, notice, host_normed, host_pairs, tables: as of `Frame`. seen, experts: of each layer; experts is None for a
    dense one, and its `log` is the offset in the log of a row.
    """

    state: int
    tables: Any
    notice: int
    host_normed: int
    host_pairs: int
    seen: Sequence[Seen]
    experts: Sequence[Experts | None]


@dataclass(slots=True)
class _Described:
    """One layer: its nodes up to the router, and behind it."""

    attend: Nodes
    block: RoutedBlock | None
    experts: Experts | None


class CardSteps:
    """The graphs for up to `rows` rows.

    log_ints: of each layer. hidden: fp32 ``[rows, H]``, what the last norm gives. logits: fp32 ``[rows, V]`` of passes
    that give them. choose: the graph that chooses from logits alone. The last two only where the pass has the head.
    """

    def __init__(
        self,
        parts: DecoderParts,
        shared: Shared,
        session: Session,
        compile_text: Compile,
        allocate: Allocate,
        rows: int,
    ) -> None:
        """Describe, compile and make the graphs. Raises: DevicePassUnavailable, BudgetError, TransferError."""
        self.rows = rows
        self._parts, self._shared, self._session = parts, shared, session
        top_k = max((router.top_k for router in parts.routers), default=1)
        self.top_k = top_k
        self.log_ints = launch("OM_CARD_LOG_INTS", rows * top_k)
        self.num_layers = len(parts.layers)
        self._log = allocate(self.num_layers * self.log_ints * LOG_INT)
        self._log[:] = 0xFF  # of no pass
        self._program, self._scratch = Program(), Scratch()
        self._frame = self._new_frame()
        self._describe()
        self._scratch.make(allocate)
        self._frame = self._new_frame()
        begin, layers, ends, choice = self._describe()
        self._program.load(session, compile_text)
        self._owned: list[object] = [begin, layers, ends, choice]
        self.executables: list[int] = []
        self._layers = (CardLayerStruct * self.num_layers)(*map(self._layer_struct, layers))
        self.choose = self._executable(choice) if choice.nodes else 0
        self.struct = CardStepsStruct(
            layers=ctypes.addressof(self._layers),
            num_layers=self.num_layers,
            begin=self._executable(begin),
            ends=(ctypes.c_void_p * len(GIVEN))(*map(self._executable, ends)),
            log=self._log.data_ptr(),
            log_bytes=self.num_layers * self.log_ints * LOG_INT,
        )
        self.address = ctypes.addressof(self.struct)
        self.num_nodes = sum(len(each.nodes) for each in (begin, ends[0])) + sum(
            len(layer.attend.nodes) + (len(layer.block.experts.nodes) if layer.block else 0) for layer in layers
        )

    @property
    def num_bytes(self) -> int:
        """Device memory of its buffers."""
        return self._scratch.num_bytes + self._log.numel()

    @property
    def hidden(self) -> Tensor:
        return self._numbers(HIDDEN, self._parts.hidden)

    @property
    def logits(self) -> Tensor:
        assert self._parts.head is not None
        return self._numbers(LOGITS, out_features(self._parts.head))

    def _numbers(self, name: str, columns: int) -> Tensor:
        return self._scratch.tensor(name).view(torch.float32)[: self.rows * columns].view(self.rows, columns)

    def apply_node(self, params: Any) -> CardNodeStruct:
        """The launch of the host's edits."""
        node = Node(kernel="om_apply", params=params, threads=launch("OM_APPLY_THREADS"), grid=(1, 1))
        self._owned.append(params)
        return node.struct(self._program)

    def close(self) -> None:
        """Free the graphs; no pass may be under way."""
        for executable in self.executables:
            self._session.free_graph(executable)
        self.executables.clear()
        self._program.close()

    def _new_frame(self) -> Frame:
        shared = self._shared
        return Frame(
            program=self._program,
            scratch=self._scratch,
            rows=self.rows,
            hidden=self._parts.hidden,
            num_layers=self.num_layers,
            state=shared.state,
            tables=shared.tables,
            notice=shared.notice,
            host_normed=shared.host_normed,
            host_pairs=shared.host_pairs,
        )

    def _describe(self) -> tuple[Nodes, list[_Described], list[Nodes], Nodes]:
        begin = self._begin()
        added: Added | None = None
        layers = []
        for layer, seen, experts in zip(self._parts.layers, self._shared.seen, self._shared.experts, strict=True):
            described, added = self._describe_layer(layer, seen, experts, added)
            layers.append(described)
        assert added is not None
        ends, choice = self._ends(added)
        return begin, layers, ends, choice

    def _describe_layer(
        self, layer: DecoderLayer, seen: Seen, experts: Experts | None, added: Added | None
    ) -> tuple[_Described, Added]:
        attend, frame, module, spec = Nodes(), self._frame, layer.module, layer.spec
        add = add_attention if spec.attention.delta is None else add_delta
        attended = add(attend, frame, module, spec, seen, added)
        if experts is None:
            return _Described(attend, None, None), add_dense(attend, frame, module, spec, attended)
        log = self._log.data_ptr() + experts.layer * self.log_ints * LOG_INT
        placed = Experts(
            arithmetic=experts.arithmetic,
            num_experts=experts.num_experts,
            first_key=experts.first_key,
            record_bytes=experts.record_bytes,
            layer=experts.layer,
            log=log,
        )
        block, behind = add_routed(attend, frame, module, spec, placed, attended)
        return _Described(attend, block, placed), behind

    def _begin(self) -> Nodes:
        frame, table = self._frame, self._parts.table
        nodes = Nodes()
        params = struct("embed_params")(
            **{"pass": frame.base},
            tokens=frame.tokens,
            table=frame.keeper.address(table.rows),
            x=frame.residual,
            scale=self._parts.wiring.scale,
            num_tokens=len(table.rows),
        )
        nodes.add(
            frame.program.kernel("EMBED", table.codec, frame.hidden),
            params,
            threads=launch("OM_EMBED_THREADS"),
            grid=(launch("OM_EMBED_BLOCKS", frame.hidden), frame.rows),
        )
        return nodes

    def _ends(self, added: Added) -> tuple[list[Nodes], Nodes]:
        """By what a pass gives; and the choice alone. Without the head every pass gives the hidden state."""
        frame, head, norm = self._frame, self._parts.head, self._parts.final_norm
        ends, choice = [], Nodes()
        for gives in GIVEN:
            ends.append(Nodes())
            add_end(ends[-1], frame, norm, head, added, gives=gives)
        if head is not None:
            add_choice(choice, frame, out_features(head))
        return ends, choice

    def _layer_struct(self, layer: _Described) -> CardLayerStruct:
        made = CardLayerStruct(attend=self._executable(layer.attend))
        if layer.block is None or layer.experts is None:
            return made
        block, experts = layer.block, layer.experts
        made.experts, made.hits = self._executable(block.experts), self._executable(block.hits)
        made.resolve, made.take = self._node(block.resolve), self._node(block.take)
        made.moe = experts.arithmetic.kernel.struct_address
        made.first_key, made.top_k, made.stride = experts.first_key, block.top_k, block.stride
        made.weight_scale, made.scales_inputs = experts.arithmetic.pair_scale, int(block.scales_inputs)
        return made

    def _executable(self, nodes: Nodes) -> int:
        executable = nodes.executable(self._session, self._program)
        self.executables.append(executable)
        return executable

    def _node(self, node: Node) -> int:
        found: CardNodeStruct = node.struct(self._program)
        self._owned.append(found)
        return ctypes.addressof(found)
