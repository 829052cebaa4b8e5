"""The device pass: rows through all layers of a decoder on a card, by graphs that native code launches.

Python is not between two layers. It is needed before a pass, for what has changed since the last one; behind it, for
the account; and where a pass stops because an expert is neither on the card nor where the card can fetch it.
"""

import ctypes
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from offload_moe.card.account import Account
from offload_moe.card.memory import Allocate
from offload_moe.card.mode import ModeChoice
from offload_moe.card.model import DecoderParts
from offload_moe.card.program import Compile
from offload_moe.card.ranges import named
from offload_moe.card.rooms import Rooms
from offload_moe.card.state import CardState
from offload_moe.card.steps import CardSteps
from offload_moe.card.stops import Stops
from offload_moe.card.structs import struct
from offload_moe.card.tables import CardTables
from offload_moe.decode.next_token import Draw, Wanted
from offload_moe.errors import BudgetError, DevicePassUnavailable, TransferError
from offload_moe.native.constants import GIVES_HIDDEN, GIVES_LOGITS, GIVES_TOKENS, MAX_ROWS, UNDER_WAY
from offload_moe.native.library import load_library
from offload_moe.native.session import Session
from offload_moe.native.structs import CardOptionsStruct
from offload_moe.residency.hierarchy import Hierarchy

logger = logging.getLogger(__name__)

POLL_S = 0.05
ROWS = (1, 2, 4, 8)  # that kernels are compiled for
SHORT_OF_MEMORY = -1


class CardPass:
    """A decoder on a card. mode: how its passes go. num_stops: of all passes.

    queued_s: processor seconds of the callers, of all passes, before everything was queued: the card waits for them.
    """

    def __init__(
        self,
        parts: DecoderParts,
        hierarchy: Hierarchy,
        session: Session,
        compile_text: Compile,
        allocate: Allocate,
        tables: CardTables,
        rooms: Rooms,
        processors: int,
    ) -> None:
        """Compiles the kernels for one row. Raises: DevicePassUnavailable, BudgetError, TransferError."""
        self.parts, self.hierarchy, self.rooms, self.tables = parts, hierarchy, rooms, tables
        self._session, self._compile, self._allocate, self._processors = session, compile_text, allocate, processors
        self._library = load_library()
        self._steps: dict[int, CardSteps] = {}
        self._refused: set[int] = set()  # numbers of rows that there are no graphs for
        self._lock = threading.RLock()
        self.mode = ModeChoice()
        self.queued_s = 0.0
        self._state = CardState(tables.edits)
        first = self._steps_of(1)
        scaling = [router.top_k for router in parts.routers if router.scales_inputs]
        self._scaled = np.zeros((MAX_ROWS * max(scaling, default=0), parts.hidden), dtype=np.float32)
        params = struct("apply_params")(
            state=tables.state.data_ptr(), tables=tables.pool.tables, edits=tables.edits.address
        )
        self._apply = first.apply_node(params)
        self._options = CardOptionsStruct(
            session=session.address,
            apply=ctypes.addressof(self._apply),
            notice=tables.notice.host,
            edits=tables.edits.host,
            num_edits=tables.edits.count_address,
            host_log=tables.log.ctypes.data,
            ram=hierarchy.ram.residency.table.handle,
            host_normed=tables.host_normed.host,
            host_pairs=tables.host_pairs.host,
            scaled=self._scaled.ctypes.data,
            hidden=parts.hidden,
        )
        self._handle: int = self._library.om_card_open(ctypes.addressof(self._options))
        if not self._handle:
            raise MemoryError("No memory for a pass of the card.")
        self._account = Account(parts, hierarchy, tables.pool)
        self._stops = Stops(parts, hierarchy, tables, self._account, self._apply_now)

    @property
    def num_stops(self) -> int:
        return self._stops.count

    @property
    def num_bytes(self) -> int:
        """Device memory of the buffers of all graphs."""
        return sum(steps.num_bytes for steps in self._steps.values())

    def run(
        self, ids: Sequence[int], positions: Sequence[int], caches: Sequence[Any], wanted: Wanted | None = None
    ) -> Tensor:
        """The rows' hidden states behind the last norm, fp32 ``[T, H]`` on the device, valid until the next pass.

        `wanted`: more that it gives, where it has the output head.

        Raises: TransferError, ModelClosed, BudgetError.
        """
        with self.hierarchy.lifecycle, self._lock:
            called_s = time.thread_time()
            steps = self._steps_for(len(ids))
            moves = self.rooms.states.moves(caches)
            are_extended = self._prepare(positions, caches)
            is_stepwise = self.mode.choose()
            began_s = time.perf_counter()
            try:
                with named(f"pass of {len(ids)}, {self.mode.name}: queue"):
                    self._begin(steps, ids, positions, caches, moves, wanted, is_stepwise=is_stepwise)
                self.queued_s += time.thread_time() - called_s
                if not are_extended:
                    self.rooms.extend(caches)
                self._account.settle()
                self.tables.pool.publish_worths(self.tables.edits)  # for the next pass
                with named(f"pass of {len(ids)}, {self.mode.name}: follow"):
                    self._follow(steps, len(ids), is_stepwise=is_stepwise)
            except BaseException:
                with suppress(TransferError):  # of a lost card, whose error is raised already
                    self._give_up()
                raise
            seconds = time.perf_counter() - began_s
            self.tables.sources.applied()
            num_missed = self._account.end(self.tables.log, steps, len(ids))
            self._count(seconds, is_stepwise=is_stepwise)
            self.mode.measured(seconds, len(ids), num_missed=num_missed, is_stepwise=is_stepwise)
            self._give(steps, len(ids), wanted)
            return steps.hidden[: len(ids)]

    def choose(self, logits: Tensor, position: int, draw: Draw) -> int:
        """The token that a pass would choose from logits ``[1, V]`` behind this position. Raises: TransferError."""
        with self.hierarchy.lifecycle, self._lock:
            steps, token = self._steps_of(1), ctypes.c_int32()
            steps.logits.copy_(logits)
            self._session.synchronize()
            self._state.choose(position, draw)
            self._run_between(steps.choose)
            self._session.download(self.tables.state.data_ptr() + struct("state").tokens.offset, token)
            self._state.chosen([token.value])
            return token.value

    def has_graphs(self, num_rows: int) -> bool:
        """Make those for so many rows, unless they are made. False: they cannot be. Raises: TransferError."""
        with self._lock:
            if num_rows not in self._refused:
                try:
                    self._steps_for(num_rows)
                except (BudgetError, DevicePassUnavailable) as error:
                    self._refused.update(range(num_rows, MAX_ROWS + 1))
                    logger.warning("The device pass takes no %d tokens at once: %s", num_rows, error)
            return num_rows not in self._refused

    def begin_other_forward(self) -> None:
        """A forward that is no pass: it may use the device's slots and change any cache."""
        with self._lock:
            self.recall()
            self.rooms.forget()

    def end_loans(self) -> None:
        """Give slots of both tiers back to the host; waits for a pass of another thread."""
        with self._lock:
            self.recall()
            self.tables.sources.withdraw_all(self.tables.edits)
            self._apply_now()

    def _apply_now(self) -> None:
        self._run_between(0)
        self.tables.sources.applied()

    def _run_between(self, graph: int) -> None:
        """Apply the edits, run a graph unless it is 0, and wait."""
        self.tables.edits.give()
        code = self._library.om_card_run_between(self._handle, graph)
        self._check(code, "change the tables of a pass")

    def recall(self) -> None:
        """Give the slots of the device back to the host's residency; waits for a pass of another thread."""
        with self._lock:
            self._account.settle()
            self.tables.pool.recall()

    def settle(self) -> None:
        """Account for the last pass, unless one is under way, which does."""
        if self._lock.acquire(blocking=False):
            try:
                self._account.settle()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Free graphs and leases; no pass may be under way."""
        with self._lock:
            self.recall()
            with suppress(TransferError):  # of a lost card
                self._session.synchronize()  # what a pass that was given up has queued still reads the edits
            for steps in self._steps.values():
                steps.close()
            self._steps.clear()
            if self._handle:
                self._library.om_card_close(self._handle)
                self._handle = 0
                self.tables.close()

    def _steps_for(self, num_rows: int) -> CardSteps:
        return self._steps_of(next(rows for rows in ROWS if rows >= num_rows))

    def _steps_of(self, rows: int) -> CardSteps:
        """The graphs for so many rows, made at their first use."""
        if rows not in self._steps:
            shared = self.tables.shared(self.rooms, self._processors)
            self._steps[rows] = CardSteps(self.parts, shared, self._session, self._compile, self._allocate, rows)
        return self._steps[rows]

    def _prepare(self, positions: Sequence[int], caches: Sequence[Any]) -> bool:
        """What has changed since the last pass. Returns whether the caches count the rows already.

        Where nothing has changed, they are counted while the pass is under way.
        """
        end = max(positions) + 1
        if end > self.rooms.angles.num_positions:
            raise TransferError(f"Position {end} is beyond the {self.rooms.angles.num_positions} that were planned.")
        if not self.rooms.angles.are_of(end):
            self._session.synchronize()
            self.rooms.angles.turn(end)
            self._session.synchronize()
        has_place = self.rooms.has_place(caches, positions)
        if not has_place:
            self._session.synchronize()
            self.rooms.attended.have(self.rooms.angles.num_positions)
            self.rooms.prepare(caches, positions)
            self._session.synchronize()
        if not self.tables.pool.is_lent:
            self.tables.pool.lend(self.tables.edits)
            self.tables.pool.publish_worths(self.tables.edits)
            self._session.synchronize()
        self.tables.sources.publish(self.tables.edits)
        return not has_place

    def _begin(
        self,
        steps: CardSteps,
        ids: Sequence[int],
        positions: Sequence[int],
        caches: Sequence[Any],
        moves: Sequence[tuple[int, int]],
        wanted: Wanted | None,
        *,
        is_stepwise: bool,
    ) -> None:
        draw = None if wanted is None else wanted.draw
        gives = GIVES_HIDDEN if wanted is None else GIVES_LOGITS if draw is None else GIVES_TOKENS
        counts = Counter(map(id, caches))
        num_rows = [counts[id(cache)] for cache in caches]
        self._state.begin(ids, positions, num_rows, draw, moves, is_stepwise=is_stepwise)
        self._account.begin(self._library.om_card_number(self._handle))
        self.tables.edits.give()
        code = self._library.om_card_begin(self._handle, steps.address, len(ids), int(is_stepwise), gives)
        self._check(code, "begin a pass")

    def _give(self, steps: CardSteps, num_rows: int, wanted: Wanted | None) -> None:
        chosen: Sequence[int] = ()
        if wanted is not None and wanted.draw is None:
            wanted.logits = steps.logits[:num_rows]
        elif wanted is not None:
            wanted.tokens = chosen = self.tables.read_notice().tokens[:num_rows]
        self._state.passed(chosen)

    def _follow(self, steps: CardSteps, num_rows: int, *, is_stepwise: bool) -> None:
        """Until the pass has ended; brings what it needs."""
        at = self._next(POLL_S)
        while at != steps.num_layers:
            if at == UNDER_WAY:
                self.hierarchy.lifecycle.check_waiting()
                at = self._next(POLL_S)
            elif is_stepwise:
                at = self._compute_waves(at, num_rows)
            else:
                is_stepwise = self._stops.make_possible(at, num_rows, steps)
                if is_stepwise:
                    self._state.forget("MODE")
                self.tables.edits.give()
                code = self._library.om_card_continue(self._handle, int(is_stepwise))
                self._check(code, "continue a pass")
                at = self._next(POLL_S)

    def _compute_waves(self, at: int, num_rows: int) -> int:
        """The CPU's share of a stepwise layer that is not in RAM, as it comes there. Returns as `_next`."""
        now = at
        for _ in self._stops.bring_to_ram(at, num_rows):
            if (now := self._next(0.0)) != at:
                break
        return now

    def _next(self, limit_s: float) -> int:
        at = int(self._library.om_card_next(self._handle, limit_s))
        self._check(at, "compute a pass")
        return at

    def _give_up(self) -> None:
        """What was queued runs to its end, and the host reads what the card has left."""
        self._state.forget()
        self.rooms.forget()
        self._check(self._library.om_card_cancel(self._handle), "give a pass up")
        self.tables.edits.add("STOP", 0)
        self.tables.edits.add("PASS", self._library.om_card_number(self._handle))
        self._apply_now()
        self._account.read_back(self._session)

    def _count(self, seconds: float, *, is_stepwise: bool) -> None:
        """The pass, and the CPU's share of it."""
        counters = self.hierarchy.counters
        if is_stepwise:
            counters.num_stepwise += 1
            counters.stepwise_s += seconds
        else:
            counters.num_queued += 1
            counters.queued_s += seconds
        counters.num_computed_on_cpu += self._library.om_card_num_on_cpu(self._handle)
        counters.cpu_s += self._library.om_card_cpu_seconds(self._handle)

    def _check(self, result: int, what: str) -> None:
        if result == SHORT_OF_MEMORY:
            raise MemoryError("No memory for the activations of a decode step.")
        self._session.check_graph(result, what)
