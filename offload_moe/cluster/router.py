"""Which replica answers a request: where the longest part of its beginning was computed, unless others are freer.

A rule in one unit, characters of a prompt that have to be computed: what a replica has to do before it, and what the
request would need there. Replicas without work and without a known beginning are taken in turn.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from offload_moe.cluster.chains import Chain

MOST_KEPT = 16384  # links of each replica: eight million characters at most, a few megabytes here
ANSWER = 4096  # characters of a prompt that are computed in the time of an answer: a guess, as answers differ


@dataclass(slots=True, eq=False)
class Ticket:
    """A request at a replica. num_known: characters of its beginning that were computed there before."""

    name: str
    chain: Chain
    num_known: int

    @property
    def work(self) -> int:
        return self.chain.length - self.num_known + ANSWER


@dataclass(slots=True)
class _Replica:
    kept: OrderedDict[object, None] = field(default_factory=OrderedDict)  # the least recently used link first
    running: set[Ticket] = field(default_factory=set)
    used_at: int = 0

    @property
    def work(self) -> int:
        return sum(ticket.work for ticket in self.running)

    def known(self, chain: Chain) -> int:
        """Characters from the beginning of a chain."""
        length = 0
        for key, end in zip(chain.keys, chain.lengths, strict=True):
            if key not in self.kept:
                break
            length = end
        return length

    def keep(self, chain: Chain, most: int) -> None:
        """The end of a conversation goes before its beginning."""
        for key in reversed(chain.keys):
            self.kept[key] = None
            self.kept.move_to_end(key)
        while len(self.kept) > most:
            self.kept.popitem(last=False)


class Router:
    """Replicas by their names. For one thread."""

    def __init__(self, *, most_kept: int = MOST_KEPT) -> None:
        """most_kept: links of beginnings, for each replica."""
        self._replicas: dict[str, _Replica] = {}
        self._most_kept = most_kept
        self._clock = 0

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return [*self._replicas]

    def num_running(self, name: str) -> int:
        """Requests that are at a replica now."""
        return len(self._replicas[name].running)

    def add(self, name: str) -> None:
        """A replica that has computed nothing yet."""
        self._replicas[name] = _Replica()

    def remove(self, name: str) -> None:
        """It has died, and what it had computed is lost."""
        self._replicas.pop(name, None)

    def take(self, chain: Chain, without: Collection[str] = ()) -> Ticket | None:
        """Send a request to a replica, until `give_back`; None where there is none but those excluded."""
        best: tuple[int, int, int] | None = None
        ticket = None
        for name, replica in self._replicas.items():
            if name in without:
                continue
            known = replica.known(chain)
            rank = (replica.work + chain.length - known, len(replica.running), replica.used_at)
            if best is None or rank < best:
                best, ticket = rank, Ticket(name, chain, known)
        if ticket is not None:
            self._begin(self._replicas[ticket.name], ticket)
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """The request has ended, or was lost."""
        replica = self._replicas.get(ticket.name)
        if replica is not None:
            replica.running.discard(ticket)

    def _begin(self, replica: _Replica, ticket: Ticket) -> None:
        self._clock += 1
        replica.used_at = self._clock
        replica.running.add(ticket)
        replica.keep(ticket.chain, self._most_kept)
