"""What the host does where a pass cannot go on without it."""

from collections.abc import Callable, Iterator
from typing import Any

from offload_moe.card.account import Account
from offload_moe.card.model import DecoderParts
from offload_moe.card.steps import CardSteps
from offload_moe.card.structs import constant
from offload_moe.card.tables import CardTables
from offload_moe.residency.hierarchy import Hierarchy

MISSING_STOP, HIT = constant("OM_STOP_MISSING"), constant("OM_CARD_HIT")


class Stops:
    """Brings the experts that stopped a pass. count: of the stops of all passes."""

    def __init__(
        self,
        parts: DecoderParts,
        hierarchy: Hierarchy,
        tables: CardTables,
        account: Account,
        apply_now: Callable[[], None],
    ) -> None:
        """apply_now: applies the edits while no kernel runs, and waits."""
        self._apply_now = apply_now
        self._hierarchy, self._tables, self._account = hierarchy, tables, account
        self._top_k = [0 if layer.spec.router is None else layer.spec.router.top_k for layer in parts.layers]
        self.count = 0

    def make_possible(self, at: int, num_rows: int, steps: CardSteps) -> bool:
        """Collect the edits with which a stopped layer goes on. Returns whether stepwise from there on.

        Raises: TransferError, ModelClosed.
        """
        self.count += 1
        notice, edits = self._tables.read_notice(), self._tables.edits
        # More experts than slots: the CPU computes those that are missing.
        is_stepwise: bool = notice.stop != MISSING_STOP
        if is_stepwise:
            self._apply_now()  # what earlier stops have withdrawn leaves RAM slots, which experts need now
            edits.add("MODE", 1)
        else:
            self._bring(at, self._chosen(notice, at, num_rows), self._missing(notice, at, num_rows), steps, num_rows)
        edits.add("STOP", 0)
        return is_stepwise

    def bring_to_ram(self, at: int, num_rows: int) -> Iterator[None]:
        """Bring the missing experts of a stepwise layer to RAM, in waves; each stays until the next one is needed."""
        missing = self._missing(self._tables.read_notice(), at, num_rows)
        with self._hierarchy.ram.acquire(self._account.ordinals[at], missing) as lease:
            for _ in lease:
                yield

    def _bring(self, at: int, chosen: list[int], missing: list[int], steps: CardSteps, num_rows: int) -> None:
        """To RAM where the card can fetch them from there, else to its slots."""
        tables, ordinal, keys = self._tables, self._account.ordinals[at], self._hierarchy.scheduler.keys
        wanted = tuple(keys.keys(ordinal, missing))
        tables.sources.withdraw_for(len(missing), tables.edits)
        self._apply_now()
        with self._hierarchy.ram.acquire(ordinal, missing) as lease:
            for _ in lease:
                pass
            tables.sources.publish(tables.edits, wanted)
        if tables.sources.is_published[list(wanted)].all():
            return
        self._account.follow(tables.log, steps, num_rows)
        tables.pool.recall()
        scheduler = self._hierarchy.scheduler
        with scheduler.acquire(ordinal, chosen) as lease:
            for _ in lease:
                pass
            scheduler.settle()
        tables.pool.lend(tables.edits)

    def _chosen(self, notice: Any, at: int, num_rows: int) -> list[int]:
        return sorted(set(notice.ids[: num_rows * self._top_k[at]]))

    def _missing(self, notice: Any, at: int, num_rows: int) -> list[int]:
        count = num_rows * self._top_k[at]
        pairs = zip(notice.ids[:count], notice.found[:count], strict=True)
        return sorted({expert for expert, found in pairs if found != HIT})
