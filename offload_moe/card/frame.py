"""What the layers of a pass share while it is described."""

from dataclasses import dataclass, field
from typing import Any

from offload_moe.card.launches import launch
from offload_moe.card.linears import Inputs, Keeper, inputs_array
from offload_moe.card.memory import Scratch
from offload_moe.card.nodes import Nodes
from offload_moe.card.norms import Norm
from offload_moe.card.program import Program
from offload_moe.card.structs import struct


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What the last block gives, which the next norm adds to the residual.

    address ``[T, num_parts, H]``; from_zero: the parts are added from +0. scale: of their sum.
    """

    address: int
    num_parts: int
    from_zero: bool
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What the kernels of every layer share.

    rows: that kernels are compiled for. hidden: numbers of a row. state: the address of `om_card_state`.
    tables: `om_card_tables`. notice, host_normed, host_pairs: addresses of shared memory. num_layers: of the decoder.
    """

    program: Program
    scratch: Scratch
    keeper: Keeper = field(default_factory=Keeper)
    rows: int
    hidden: int
    num_layers: int
    state: int
    tables: Any
    notice: int
    host_normed: int
    host_pairs: int

    @property
    def base(self) -> Any:
        """`om_card_pass`: what every kernel reads first."""
        kind = struct("state")
        return struct("pass")(stop=self.state + kind.stop.offset, num_rows=self.state + kind.num_rows.offset)

    @property
    def positions(self) -> int:
        return self.state + int(struct("state").positions.offset)

    @property
    def tokens(self) -> int:
        return self.state + int(struct("state").tokens.offset)

    @property
    def moves(self) -> tuple[int, int]:
        """Of the places of states that rows read, and of those that they leave."""
        kind = struct("state")
        return self.state + int(kind.reads.offset), self.state + int(kind.leaves.offset)

    @property
    def draws(self) -> int:
        return self.state + int(struct("state").draws.offset)

    def floats(self, name: str, columns: int) -> int:
        """The address of ``[R, columns]``."""
        return self.scratch.floats(name, self.rows, columns)

    def inputs(self, name: str, codecs: set[str], columns: int) -> Inputs:
        """Room for activations of these codecs."""
        return {codec: self.scratch.input(f"{name} {codec}", self.rows, columns) for codec in sorted(codecs)}

    @property
    def residual(self) -> int:
        return self.floats("residual", self.hidden)

    def add_norm(
        self,
        nodes: Nodes,
        *,
        norm: Norm,
        added: Added | None,
        inputs: Inputs,
        normed: int = 0,
        gate: int = 0,
        shares: int = 0,
        x: int | None = None,
        columns: int | None = None,
        keeps_sum: bool = True,
    ) -> None:
        """The residual plus what was added, its norm, and that in int8. x: another row than the residual's."""
        source = self.residual if x is None else x
        width = self.hidden if columns is None else columns
        params = struct("norm_params")(
            **{"pass": self.base},
            x=source,
            added=0 if added is None else added.address,
            weight=self.keeper.numbers(norm.weight),
            bias=self.keeper.numbers(norm.bias),
            gate=gate,
            sum=source if keeps_sum and added is not None else 0,
            normed=normed,
            shares=shares,
            inputs=inputs_array(inputs),
            epsilon=norm.epsilon,
            scale=1.0 if added is None else added.scale,
            num_added=0 if added is None else added.num_parts,
            from_zero=int(added is not None and added.from_zero),
        )
        kernel = self.program.kernel("NORM", width)
        nodes.add(kernel, params, threads=launch("OM_NORM_THREADS"), grid=(self.rows,))
