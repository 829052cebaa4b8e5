"""Key/value caches of several conversations: each request takes the one that shares the most tokens with its prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from offload_moe.chat.prefix import PrefixCache

LEAST_SHARED = 16  # tokens; copying a cache for fewer saves nothing
MOST_LOST = 1 / 3  # of a cache's tokens, where a request takes it over: its last answer, as a template rewrites it


@dataclass(slots=True, kw_only=True)
class _Kept:
    prefix: PrefixCache
    used_at: int
    num_continued: int = 0  # requests that went on from it
    is_lent: bool = False


class Prefixes:
    """Caches that are kept, least valuable first to go. The engine's thread uses it alone.

    A cache that was never continued is worth less than any that was: requests on the side (titles, tags) push each
    other out, and no long conversation. A request that leaves a conversation early, as a sub-agent does behind the same
    system prompt, gets a copy of what they share, and the conversation stays.
    """

    def __init__(
        self,
        make: Callable[[], PrefixCache],
        *,
        most: int,
        budget_tokens: int | None = None,
        can_park: Callable[[int], bool] = lambda num_bytes: False,
    ) -> None:
        """most: caches, lent ones included; 0 keeps none. budget_tokens: of all kept caches together.

        can_park: whether RAM has room for so many bytes of a device's cache. A cache that is over the budget is moved
        there instead of being dropped, and back when a request takes it.
        """
        self._make, self._most, self.budget_tokens = make, most, budget_tokens
        self._can_park = can_park
        self._kept: list[_Kept] = []
        self._clock = count()

    @property
    def keeps_any(self) -> bool:
        return self._most > 0

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_tokens(self) -> int:
        """Tokens that take the model's own memory, in caches that no request uses at the moment."""
        return sum(each.prefix.num_tokens for each in self._free() if not each.prefix.is_parked)

    def lend(self, ids: Sequence[int]) -> PrefixCache:
        """The cache to compute this prompt with; it is in use until `give_back`."""
        best = max(self._free(), key=lambda each: each.prefix.num_usable(ids), default=None)
        num_shared = best.prefix.num_usable(ids) if best is not None else 0
        if best is None or num_shared < LEAST_SHARED:
            return self._add(self._make(), len(ids))
        if best.prefix.num_lost(ids) > MOST_LOST * best.prefix.num_tokens:
            return self._add_fork(best, ids)
        best.num_continued += 1
        best.used_at = next(self._clock)
        best.is_lent = True
        best.prefix.unpark()
        self._trim(0)
        return best.prefix

    def give_back(self, prefix: PrefixCache) -> None:
        """The request has ended."""
        for each in self._kept:
            if each.prefix is prefix:
                each.is_lent = False
        self._trim(0)

    def make_room(self) -> bool:
        """Park or drop the least valuable cache that is not in use; False where there is none."""
        kept = [each for each in self._free() if not each.prefix.is_parked]
        if not kept:
            return False
        least = min(kept, key=_value)
        if self._can_park(least.prefix.num_bytes):
            least.prefix.park()
        else:
            self._kept.remove(least)
        return True

    def clear(self) -> None:
        self._kept.clear()

    def _add(self, prefix: PrefixCache, num_new: int) -> PrefixCache:
        self._trim(num_new, num_more=1)
        if self._most:
            self._kept.append(_Kept(prefix=prefix, used_at=next(self._clock), is_lent=True))
        return prefix

    def _add_fork(self, kept: _Kept, ids: Sequence[int]) -> PrefixCache:
        """The conversation stays, and is worth what it was."""
        kept.is_lent = True  # so that making room keeps it
        try:
            return self._add(kept.prefix.fork(ids), len(ids))
        finally:
            kept.is_lent = False

    def _trim(self, num_new: int, num_more: int = 0) -> None:
        while len(self._kept) + num_more > self._most and (free := self._free()):
            self._kept.remove(min(free, key=_value))
        while not self._fits(num_new) and self.make_room():
            pass

    def _fits(self, num_new: int) -> bool:
        return self.budget_tokens is None or self.num_tokens + num_new <= self.budget_tokens

    def _free(self) -> list[_Kept]:
        return [each for each in self._kept if not each.is_lent]


def _value(kept: _Kept) -> tuple[bool, int]:
    return kept.num_continued > 0, kept.used_at
