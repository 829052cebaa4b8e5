"""How the experts of an acquired layer are counted: in policy, popularity and counters, and for an observer.

Callers hold the lock of the tier, except those of `note_passed`, which takes it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from offload_moe.native.kernels import ARRIVING, MISSING
from offload_moe.residency.policy import OfTokens
from offload_moe.residency.tier import Tier

Mark = tuple[int, int]
Found = tuple[list[int], list[int]]  # experts that were on their way, and that were absent; all others were resident


class Choice(NamedTuple):
    """The distinct experts of one layer in a token pass, and how each was found: HIT, ARRIVING or MISSING.

    shares: of the tokens that chose each expert; None for one token.
    """

    experts: Sequence[int]
    found: Sequence[int]
    shares: Sequence[float] | None = None


def mark(tier: Tier) -> Mark:
    """Useful prefetches and bytes read so far."""
    return tier.counters.num_useful_prefetches, tier.counters.disk_bytes


def note_layer(
    tier: Tier,
    layer: int,
    keys: Sequence[int],
    arriving: Sequence[int] = (),
    missing: Sequence[int] = (),
    shares: Sequence[float] | None = None,
    num_tokens: int = 1,
) -> None:
    """Count one acquire. arriving, missing: experts that were on their way, or absent; all others were resident.

    shares, num_tokens: as `Policy.access` takes them.
    """
    if tier.flying:
        tier.drop_wrong_guesses(layer, keys)
    tier.residency.policy.access(layer, keys, shares, num_tokens)
    tier.uses.note(keys)
    if tier.unproven:
        first = tier.keys.first(layer)
        for key in keys:
            tier.demanded(key, is_here=key - first not in missing)
    tier.counters.num_waves += 1
    count_found(tier, layer, len(keys), arriving, missing)


def count_found(tier: Tier, layer: int, num_experts: int, arriving: Sequence[int], missing: Sequence[int]) -> None:
    """Add one acquire of `num_experts` experts to the counters, by how they were found."""
    _count(tier, 1, num_experts, len(arriving), len(missing))
    if tier.observer is not None:
        tier.observer.acquired(layer, [*arriving], [*missing])


def _count(tier: Tier, num_acquires: int, num_experts: int, num_arriving: int, num_missing: int) -> None:
    counters = tier.counters
    counters.num_acquires += num_acquires
    counters.num_hits += num_experts - num_missing - num_arriving
    counters.num_delayed_hits += num_arriving
    counters.num_misses += num_missing


def sort_found(chosen: Sequence[int], states: Sequence[int]) -> Found:
    """The arriving and the missing ones of the chosen experts. states: HIT, ARRIVING or MISSING of each."""
    found = list(zip(chosen, states, strict=True))
    arriving = [expert for expert, how in found if how == ARRIVING]
    return arriving, [expert for expert, how in found if how == MISSING]


def note_passed(
    tier: Tier, layer: int, choices: Iterable[Choice], num_tokens: int = 1, marks: list[Mark] | None = None
) -> None:
    """Count layers from `layer` on that a pass of so many tokens has computed, as an `acquire` of each would.

    marks: gets the `mark` after each layer.
    """
    choices = list(choices)
    with tier.changed:
        tier.drain_completions()
        if num_tokens == 1 and marks is None and not (tier.flying or tier.unproven or tier.observer):
            _note_token(tier, layer, choices)
            choices = []
        for number, (chosen, states, shares) in enumerate(choices, layer):
            arriving, missing = sort_found(chosen, states) if any(states) else ([], [])
            note_layer(tier, number, tier.keys.keys(number, chosen), arriving, missing, shares, num_tokens)
            if marks is not None:
                marks.append(mark(tier))
        tier.changed.notify_all()


def _note_token(tier: Tier, layer: int, choices: Sequence[Choice]) -> None:
    """As `note_layer` of each, where nothing is to be done for single layers."""
    keys = [tier.keys.keys(number, choice.experts) for number, choice in enumerate(choices, layer)]
    policy = tier.residency.policy
    if isinstance(policy, OfTokens):
        policy.access_token(layer, keys)
    else:
        for number, each in enumerate(keys, layer):
            policy.access(number, each)
    tier.uses.note(key for each in keys for key in each)
    found = [how for choice in choices for how in choice.found]
    tier.counters.num_waves += len(keys)
    _count(tier, len(keys), len(found), found.count(ARRIVING), found.count(MISSING))
