"""What the page and the metrics show: the hierarchy at work. Reading costs the engine a short lock."""

import time
from typing import Any

import psutil

from offload_moe.engine.model import Model
from offload_moe.residency.hierarchy import Hierarchy
from offload_moe.residency.residency import SlotState
from offload_moe.residency.tier import Tier
from offload_moe.serve.host import Host

ON_DISK, IN_RAM, IN_VRAM, ON_ITS_WAY = "0123"


def live(host: Host) -> dict[str, Any]:
    """See docs/serve.md, "The page's data"."""
    board = host.board
    loaded = host.loaded
    document: dict[str, Any] = {
        "model": host.name,
        "state": host.state,
        "at_s": time.monotonic(),
        "started_s": board.started_at,
        "tokens": {
            "prompt": board.num_prompt_tokens,
            "cached": board.num_cached_tokens,
            "generated": board.num_generated_tokens,
        },
        "requests": {
            "running": host.worker.num_running,
            "waiting": host.worker.num_waiting,
            "finished": board.num_finished,
            "cancelled": board.num_cancelled,
            "refused": board.num_refused,
        },
        "running": [each.to_json() for each in list(board.running.values())],
        "prefixes": {"kept": 0, "tokens": 0, "budget_tokens": None},
    }
    if loaded is None:
        return document | _without_model(host)
    prefixes = loaded.prefixes
    document["prefixes"] = {
        "kept": prefixes.num_kept,
        "tokens": prefixes.num_tokens,
        "budget_tokens": prefixes.budget_tokens,
    }
    return document | totals(host) | _of_model(loaded.model)


def totals(host: Host) -> dict[str, Any]:
    """What the experts did since the server began, through unloads too."""
    counters = host.counters
    return {
        "experts": {
            "hits": counters.num_hits,
            "delayed": counters.num_delayed_hits,
            "misses": counters.num_misses,
            "evictions": counters.num_evictions,
            "prefetches": counters.num_prefetches,
            "useful_prefetches": counters.num_useful_prefetches,
        },
        "passes": {"number": counters.num_passes, "rows": counters.num_rows},
        "guesses": {
            "right": counters.num_right_guesses,
            "wrong": counters.num_guesses - counters.num_right_guesses,
            "saved_s": counters.saved_by_guesses_s,
            "gain": counters.guess_gain,
        },
        "stall_s": counters.stall_s,
        "bytes": {"disk": counters.disk_bytes, "h2d": counters.h2d_bytes},
    }


def _without_model(host: Host) -> dict[str, Any]:
    return totals(host) | {
        "residency": [],
        "uses": [],
        "slots": {"ram": None, "vram": None},
        "memory": {"rest of the process": psutil.Process().memory_info().rss},
        "budget": {"ram": None, "vram": None},
    }


def _of_model(model: Model) -> dict[str, Any]:
    hierarchy, placement = model.engine.hierarchy, model.placement
    has_device = hierarchy.scheduler is not hierarchy.ram
    uses = hierarchy.scheduler.uses.counts
    return {
        "residency": residency(hierarchy),
        "uses": hierarchy.pools.keys.rows(lambda key: round(uses.get(key, 0.0), 1)),
        "slots": {
            "ram": _slots(hierarchy.ram, hierarchy.pools.slot_bytes),
            "vram": _slots(hierarchy.scheduler, hierarchy.pools.slot_bytes) if has_device else None,
        },
        "memory": model.memory,
        "budget": {
            "ram": placement.ram.budget_bytes,
            "vram": placement.vram.budget_bytes if placement.vram is not None else None,
        },
    }


def _slots(tier: Tier, slot_bytes: int) -> dict[str, int]:
    residency, counters = tier.residency, tier.counters
    return {
        "slots": residency.num_slots,
        "resident": residency.num_resident,
        "slot_bytes": slot_bytes,
        "hits": counters.num_hits,
        "delayed": counters.num_delayed_hits,
        "misses": counters.num_misses,
    }


def residency(hierarchy: Hierarchy) -> list[str]:
    """Where each expert is: a text for each layer, a character for each expert."""
    states = [ON_DISK] * hierarchy.pools.keys.total
    _mark(hierarchy.ram, states, IN_RAM)
    if hierarchy.scheduler is not hierarchy.ram:
        _mark(hierarchy.scheduler, states, IN_VRAM)
    return ["".join(row) for row in hierarchy.pools.keys.rows(states.__getitem__)]


def _mark(tier: Tier, states: list[str], mark: str) -> None:
    with tier.changed:
        tier.drain_completions()
        for key, state in tier.residency.states():
            if state is SlotState.RESIDENT:
                states[key] = mark
            elif states[key] == ON_DISK:
                states[key] = ON_ITS_WAY
