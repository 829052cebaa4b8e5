"""What a layer that found its experts is counted as: in policy, popularity and counters, and for an observer.

The lock of the scheduler is held, but by `note_passed`, which takes it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from offload_moe.native.kernels import ARRIVING, MISSING

if TYPE_CHECKING:
    from offload_moe.residency.lease import Found
    from offload_moe.residency.scheduler import Scheduler

Mark = tuple[int, int]


def mark(scheduler: "Scheduler") -> Mark:
    """Useful prefetches and bytes read so far."""
    return scheduler.counters.num_useful_prefetches, scheduler.counters.disk_bytes


def note_layer(
    scheduler: "Scheduler",
    layer: int,
    keys: Sequence[int],
    arriving: Sequence[int] = (),
    missing: Sequence[int] = (),
) -> None:
    """One acquire. arriving, missing: experts that were on their way, or absent; all others were here."""
    scheduler.drop_wrong_guesses(layer, keys)
    scheduler.residency.policy.access(layer, keys)
    scheduler.uses.note(keys)
    if scheduler.unproven:
        first = layer * scheduler.num_experts
        for key in keys:
            scheduler.demanded(key, is_here=key - first not in missing)
    scheduler.counters.num_waves += 1
    count_found(scheduler, layer, len(keys), arriving, missing)


def count_found(
    scheduler: "Scheduler", layer: int, num_experts: int, arriving: Sequence[int], missing: Sequence[int]
) -> None:
    """One acquire of so many experts, and how they were found."""
    counters = scheduler.counters
    counters.num_acquires += 1
    counters.num_hits += num_experts - len(missing) - len(arriving)
    counters.num_delayed_hits += len(arriving)
    counters.num_misses += len(missing)
    if scheduler.observer is not None:
        scheduler.observer.acquired(layer, [*arriving], [*missing])


def sort_found(chosen: Sequence[int], states: Sequence[int]) -> "Found":
    """states: how a run found each expert."""
    found = list(zip(chosen, states, strict=True))
    arriving = [expert for expert, how in found if how == ARRIVING]
    return arriving, [expert for expert, how in found if how == MISSING]


def note_passed(
    scheduler: "Scheduler", layer: int, experts: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> list[Mark]:
    """Count layers, from this one on, that a run has done by itself, as an `acquire` of each would have been.

    found: how each expert was found. Returns what `mark` says after each.
    """
    marks = []
    with scheduler.changed:
        scheduler.drain_completions()
        for number, (chosen, states) in enumerate(zip(experts, found, strict=True), layer):
            first = number * scheduler.num_experts
            arriving, missing = sort_found(chosen, states)
            note_layer(scheduler, number, [first + expert for expert in chosen], arriving, missing)
            marks.append(mark(scheduler))
        scheduler.changed.notify_all()
    return marks
