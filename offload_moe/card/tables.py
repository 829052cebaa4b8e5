"""What all graphs of a pass share: its state, the pool, sources and edits, and memory that both sides reach."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offload_moe.card.block import Experts
from offload_moe.card.edits import Edits
from offload_moe.card.launches import launch
from offload_moe.card.memory import Allocate
from offload_moe.card.model import DecoderParts
from offload_moe.card.pool import CardPool
from offload_moe.card.rooms import Rooms
from offload_moe.card.sources import Sources
from offload_moe.card.steps import LOG_INT, Shared
from offload_moe.card.structs import struct
from offload_moe.native.constants import MAX_ROWS
from offload_moe.native.session import Session, SharedMemory
from offload_moe.residency.hierarchy import Hierarchy

OTHER_EDITS = 256  # beside those of keys and slots


class CardTables:
    """Allocated once for a model. log: that of the last pass, of all layers."""

    def __init__(
        self,
        parts: DecoderParts,
        hierarchy: Hierarchy,
        session: Session,
        allocate: Allocate,
        experts: Sequence[Experts | None],
    ) -> None:
        """On the device. Raises: BudgetError where they do not fit."""
        self.experts = experts
        self._num_layers = len(parts.layers)
        self.state = allocate(ctypes.sizeof(struct("state")))
        first = struct("state")(token=1, num_rows=1)
        self.state[: ctypes.sizeof(first)] = torch.frombuffer(bytearray(bytes(first)), dtype=torch.uint8)
        self.pool = CardPool(hierarchy, allocate)
        self.edits = Edits(session, 3 * self.pool.num_keys + 3 * self.pool.num_places + OTHER_EDITS)
        self.sources = Sources(hierarchy.ram, hierarchy.arena, hierarchy.is_direct, session)
        row_bytes = 4 * parts.hidden
        top_k = max((router.top_k for router in parts.routers), default=0)
        self._notice = SharedMemory(session, ctypes.sizeof(struct("notice")))
        self.host_normed = SharedMemory(session, MAX_ROWS * row_bytes)
        self.host_pairs = SharedMemory(session, MAX_ROWS * (top_k + 1) * row_bytes)
        num_ints = self._num_layers * launch("OM_CARD_LOG_INTS", MAX_ROWS * max(top_k, 1))
        # Page-locked: a driver waits for all that is queued before it returns from a copy to other memory.
        self._log = SharedMemory(session, num_ints * LOG_INT)
        self.log: NDArray[np.int32] = self._log.array(np.int32)

    @property
    def notice(self) -> SharedMemory:
        return self._notice

    def close(self) -> None:
        """End the leases of sources, and free shared memory; no pass runs any more."""
        self.sources.close()
        self.edits.close()
        for memory in (self._notice, self.host_normed, self.host_pairs, self._log):
            memory.close()

    def read_notice(self) -> Any:
        """A view of `om_card_notice`."""
        return struct("notice").from_address(self._notice.host)

    def shared(self, rooms: Rooms, processors: int) -> Shared:
        """For the graphs of one number of rows."""
        return Shared(
            state=self.state.data_ptr(),
            tables=self.pool.tables,
            notice=self._notice.address,
            host_normed=self.host_normed.address,
            host_pairs=self.host_pairs.address,
            seen=[rooms.seen(layer, processors) for layer in range(self._num_layers)],
            experts=self.experts,
        )
