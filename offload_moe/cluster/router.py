"""Which replica answers a request: where the longest part of its conversation was computed, unless others are freer.

A rule in one unit, characters of a prompt that have to be computed: what a replica has to do before it, and what the
request would need there. A beginning that several conversations share, such as a system prompt, does not draw them to
one replica, whose caches would not hold all of them: they are spread to where least is under way, then in turn.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from offload_moe.cluster.chains import Chain

MOST_KEPT = 16384  # links of each replica: eight million characters at most, a few megabytes here
MOST_FOLLOWED = 16 * MOST_KEPT  # links of all replicas
SEVERAL: Final = object()  # in place of the link behind another one
ANSWER = 8192  # characters of a prompt that are computed in the time of an answer: a guess, as answers differ


@dataclass(slots=True, eq=False)
class Ticket:
    """A request at a replica.

    num_known: characters of its beginning that were computed there before. work: the others, and its answer.
    """

    name: str
    num_known: int
    work: int


@dataclass(slots=True)
class _Replica:
    kept: OrderedDict[object, None] = field(default_factory=OrderedDict)  # the least recently used link first
    running: set[Ticket] = field(default_factory=set)
    used_at: int = 0

    @property
    def work(self) -> int:
        return sum(ticket.work for ticket in self.running)

    def num_known(self, chain: Chain) -> int:
        """Links from the beginning of a chain."""
        return next((at for at, key in enumerate(chain.keys) if key not in self.kept), len(chain.keys))

    def keep(self, chain: Chain, most: int) -> None:
        """The end of a conversation goes before its beginning."""
        for key in reversed(chain.keys):
            self.kept[key] = None
            self.kept.move_to_end(key)
        while len(self.kept) > most:
            self.kept.popitem(last=False)


class Router:
    """Replicas by their names. For one thread."""

    def __init__(self, *, most_kept: int = MOST_KEPT, answer: int = ANSWER) -> None:
        """most_kept: links of beginnings, for each replica. answer: see `ANSWER`."""
        self._replicas: dict[str, _Replica] = {}
        self._behind: OrderedDict[object, object] = OrderedDict()  # the link that has followed another one
        self._most_kept, self._answer = most_kept, answer
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
        name, known = None, 0
        for each, replica in self._replicas.items():
            if each in without:
                continue
            num_known = replica.num_known(chain)
            own = chain.lengths[num_known - 1] if num_known and not self._is_shared(chain, num_known) else 0
            rank = (replica.work + chain.length - own, len(replica.running), replica.used_at)
            if best is None or rank < best:
                best, name, known = rank, each, chain.lengths[num_known - 1] if num_known else 0
        if name is None:
            return None
        ticket = Ticket(name, known, chain.length - known + self._answer)
        self._begin(self._replicas[name], ticket, chain)
        return ticket

    def _is_shared(self, chain: Chain, num_known: int) -> bool:
        """Whether a conversation leaves others there, of which there are several."""
        return num_known < len(chain.keys) and self._behind.get(chain.keys[num_known - 1]) is SEVERAL

    def give_back(self, ticket: Ticket) -> None:
        """The request has ended, or was lost."""
        replica = self._replicas.get(ticket.name)
        if replica is not None:
            replica.running.discard(ticket)

    def _begin(self, replica: _Replica, ticket: Ticket, chain: Chain) -> None:
        self._clock += 1
        replica.used_at = self._clock
        replica.running.add(ticket)
        replica.keep(chain, self._most_kept)
        for key, behind in pairwise(chain.keys):
            if self._behind.setdefault(key, behind) != behind:
                self._behind[key] = SEVERAL
            self._behind.move_to_end(key)
        while len(self._behind) > MOST_FOLLOWED:
            self._behind.popitem(last=False)
