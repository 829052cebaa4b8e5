"""Passes that several answers of one model share, a row each.

The answer whose turn it is computes (see `turns.py`). Its pass takes along others that are *ready*: their last token is
chosen, and not computed yet. When their turn comes, the logits behind it are there. So no answer waits for another,
each is at most one token ahead of its reader, and there is one pass at a time, in the thread of the one that computes.

V vocabulary.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache

from offload_moe.decode import next_logits, takes_rows, takes_several
from offload_moe.errors import OffloadMoeError
from offload_moe.families.text_model import TextModel
from offload_moe.residency.counters import Counters
from offload_moe.speculate.row_governor import RowGovernor
from offload_moe.speculate.speculation import speculation_of
from offload_moe.speculate.speculator import PassCost

LIMIT_S = 5.0  # that the end of an answer waits for a pass which computes its row
_ATTRIBUTE = "_offload_moe_sharing"  # of a model


@dataclass(slots=True, kw_only=True)
class Share:
    """What the experts did for one answer in shared passes beyond what was counted while it had its turn.

    Negative for one that computed them.
    """

    num_hits: int = 0
    num_absent: int = 0
    stall_s: float = 0.0

    def add(self, other: "Share", times: int = 1) -> None:
        self.num_hits += times * other.num_hits
        self.num_absent += times * other.num_absent
        self.stall_s += times * other.stall_s


class _UnderWay:
    """A pass that is being computed."""

    def __init__(self) -> None:
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._ended = threading.Event()

    def end(self) -> None:
        self._ended.set()

    def wait(self) -> bool:
        """False where its end cannot be waited for: this thread computes it, none does behind a fork, or too long."""
        is_elsewhere = self._process == os.getpid() and self._thread != threading.get_ident()
        return is_elsewhere and self._ended.wait(LIMIT_S)


@dataclass(frozen=True, slots=True)
class Row:
    """The last token of an answer, and the cache of what comes before.

    rate: gives the tokens per time of a plain pass that the answer expects of its guesses where it computes alone.
    """

    token: int
    cache: Cache
    rate: Callable[[], float]


@dataclass(slots=True, eq=False)
class Member:
    """An answer among those that share passes.

    logits: ``[1, V]`` behind its last token, once a pass of another answer has computed it; `began_s` and `ended_s` are
    when. is_lost: it has ended while such a pass was under way, so its cache is of no use.
    """

    logits: Tensor | None = None
    began_s: float = 0.0
    ended_s: float = 0.0
    is_lost: bool = False
    goes_alone: bool = False  # until it has computed alone: a pass with it has failed
    share: Share = field(default_factory=Share)
    under_way: _UnderWay | None = None

    def take_seconds_before(self, at_s: float) -> float:
        """Those of the last pass of another answer before this time, once."""
        seconds = max(0.0, min(self.ended_s, at_s) - self.began_s)
        self.began_s = self.ended_s = 0.0
        return seconds


class Sharing:
    """Of one model. Only `pays` and `withdraw` may be called without having the turn."""

    def __init__(self) -> None:
        self.governor = RowGovernor()
        self._ready: dict[Member, Row] = {}  # the longest ready one first

    def pays(self, hf: TextModel) -> bool:
        """Whether answers at once give more tokens per second than one after another."""
        return speculation_of(hf).may_share and self.governor.pays

    @property
    def is_measuring(self) -> bool:
        """Whether other answers wait for passes of one row, without guesses, of the one whose turn it is."""
        return bool(self._ready) and self.governor.is_measuring

    def offer(self, member: Member, row: Row) -> None:
        """Its last token may be computed by a pass of another answer."""
        if not member.goes_alone:
            self._ready[member] = row

    def withdraw(self, member: Member) -> Tensor | None:
        """It is ready no more. Returns the logits behind its last token, where a pass has computed it."""
        if self._ready.pop(member, None) is not None:
            return None
        under_way = member.under_way
        if under_way is not None and not under_way.wait():
            member.is_lost = True
            return None
        logits, member.logits = member.logits, None
        return logits

    def compute(self, hf: TextModel, leader: Member, row: Row) -> Tensor | None:
        """The logits ``[1, V]`` behind the last token of this answer, computed together with others.

        None where it is to be computed alone: no other is ready, sharing does not pay, or the shared pass has failed.
        Then each is computed alone next, and the error reaches the answer that it belongs to.
        """
        if not self._ready or leader.goes_alone:
            return None
        under_way = _UnderWay()
        others = self._claim(self._partners(hf, row), under_way)
        try:
            return self._pass(hf, {leader: row, **others}) if others else None
        finally:
            for member in others:
                member.under_way = None
            under_way.end()

    def note_alone(self, member: Member, cost: PassCost, *, is_plain: bool) -> None:
        """A pass of one answer, without guesses where it `is_plain`."""
        member.goes_alone = False
        if is_plain and cost.num_rows == 1:
            self.governor.note(1, cost.seconds, cost.num_misses)

    def _partners(self, hf: TextModel, row: Row) -> list[Member]:
        """Those whose rows it pays to compute with this one."""
        ready = self._ready.copy()  # at one stroke: answers may end meanwhile, in other threads and as garbage
        number = self.governor.choose(1 + len(ready))
        rate = self.governor.rate(number)
        if number == 1 or row.rate() > rate or not speculation_of(hf).may_share or not takes_rows(hf, row.cache, 1):
            return []
        if not takes_several(hf, number):
            return []
        fitting = (member for member, its in ready.items() if its.rate() <= rate and takes_rows(hf, its.cache, 1))
        return [member for _, member in zip(range(number - 1), fitting, strict=False)]

    def _claim(self, members: Sequence[Member], under_way: _UnderWay) -> dict[Member, Row]:
        """Those that are still ready: a thread may end its answer at any time."""
        claimed = {}
        for member in members:
            member.under_way = under_way  # before it is ready no more, see `withdraw`
            row = self._ready.pop(member, None)
            if row is not None:
                claimed[member] = row
            else:
                member.under_way = None
        return claimed

    def _pass(self, hf: TextModel, rows: Mapping[Member, Row]) -> Tensor | None:
        """Of the first one, which computes."""
        leader, *others = rows
        counters = speculation_of(hf).counters
        before, began_s = _counted(counters), time.perf_counter()
        try:
            found = next_logits(hf, [row.token for row in rows.values()], [row.cache for row in rows.values()])
        except BaseException as error:
            for member in rows:
                member.goes_alone = True
            if isinstance(error, OffloadMoeError | MemoryError | RuntimeError):
                return None
            raise
        ended_s, spent = time.perf_counter(), _counted(counters)
        spent.add(before, -1)
        counters.num_passes += 1
        counters.num_rows += len(rows)
        self.governor.note(len(rows), ended_s - began_s, spent.num_absent)
        own: Tensor
        own, *logits = found.to(copy=True, dtype=torch.float32).split(1)
        share = _divided(spent, len(rows))
        leader.share.add(share, -len(others))
        for member, each in zip(others, logits, strict=True):
            member.share.add(share)
            member.began_s, member.ended_s, member.logits = began_s, ended_s, each
        return own


def sharing_of(hf: TextModel) -> Sharing:
    """That of a model, made at the first use."""
    if _ATTRIBUTE not in vars(hf):
        setattr(hf, _ATTRIBUTE, Sharing())
    found: Sharing = vars(hf)[_ATTRIBUTE]
    return found


def _counted(counters: Counters) -> Share:
    return Share(num_hits=counters.num_hits, num_absent=counters.num_absent, stall_s=counters.stall_s)


def _divided(spent: Share, num_rows: int) -> Share:
    """Of one row; what is left over stays with the answer that computes."""
    return Share(
        num_hits=spent.num_hits // num_rows,
        num_absent=spent.num_absent // num_rows,
        stall_s=spent.stall_s / num_rows,
    )
