"""Launches of kernels, in an order that a graph keeps."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offload_moe.card.program import Program
from offload_moe.native.session import Session
from offload_moe.native.structs import CardNodeStruct

MOST_BEFORE = 4  # nodes that one waits for
NOWHERE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One launch. after: places in its list of those that it waits for."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    params: Any
    after: tuple[int, ...] = ()

    def struct(self, program: Program) -> CardNodeStruct:
        """For native code; `params` must stay alive while it is used."""
        after = [*self.after, *[NOWHERE] * MOST_BEFORE][:MOST_BEFORE]
        return CardNodeStruct(
            function=program.function(self.kernel),
            params=ctypes.addressof(self.params),
            grid=(ctypes.c_int32 * 3)(*self.grid, 1),
            num_threads=self.threads,
            after=(ctypes.c_int32 * MOST_BEFORE)(*after),
        )


class Nodes:
    """The nodes of one graph."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(
        self,
        kernel: str,
        params: Any,
        *,
        threads: int,
        grid: Sequence[int],
        after: tuple[int, ...] | None = None,
    ) -> int:
        """Append a launch behind the last one, or behind those at `after`. Returns its place."""
        place = len(self.nodes)
        behind = after if after is not None else (place - 1,) if place else ()
        x, y = (*grid, 1)[:2]
        self.nodes.append(Node(kernel=kernel, grid=(x, y), threads=threads, params=params, after=behind))
        return place

    def executable(self, session: Session, program: Program) -> int:
        """The graph, ready to be launched."""
        structs = [node.struct(program) for node in self.nodes]
        return session.graph((CardNodeStruct * len(structs))(*structs))
