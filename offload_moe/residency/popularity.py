"""A small file beside the experts of a store with the uses of each, so that the next session begins warm.

It is a hint: a file that is missing, foreign, damaged or not writable affects only the first seconds.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from offload_moe.errors import OffloadMoeError
from offload_moe.residency.hierarchy import Hierarchy
from offload_moe.residency.keys import ExpertKeys
from offload_moe.store.durable import named_errors, write_file
from offload_moe.store.installed import POPULARITY_NAME

FORMAT_VERSION = 1


def read_popularity(store: Path, keys: ExpertKeys) -> dict[int, float]:
    """Uses by key; empty where the store has no file that fits its layers."""
    try:
        document = json.loads((store / POPULARITY_NAME).read_text("utf-8"))
        if document["format version"] != FORMAT_VERSION:
            return {}
        rows = document["uses"][: keys.num_layers]  # the last layer is there only in sessions that guess by it
        rows += [[0.0] * number for number in keys.num_experts[len(rows) :]]
        counts = {key: float(count) for key, count in keys.from_rows(rows).items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {key: count for key, count in counts.items() if 0 < count < float("inf")}


def write_popularity(store: Path, counts: Mapping[int, float], keys: ExpertKeys) -> None:
    """Write the file atomically; a store that cannot be written is left as it is."""
    document = {"format version": FORMAT_VERSION, "uses": keys.rows(lambda key: round(counts.get(key, 0.0)))}
    with contextlib.suppress(OffloadMoeError, OSError), named_errors(store):
        write_file(store / POPULARITY_NAME, json.dumps(document, separators=(",", ":")).encode())


def warm_start(hierarchy: Hierarchy, store: Path) -> None:
    """Fill free slots with the experts that earlier sessions used most, in the background. Returns at once."""
    pools = hierarchy.pools
    uses = hierarchy.scheduler.uses
    uses.restore(read_popularity(store, pools.keys))
    favourites = uses.most_used()
    hierarchy.scheduler.fill(favourites)
    if hierarchy.ram is not hierarchy.scheduler:  # the device tier gets the first ones
        hierarchy.ram.fill([*favourites[pools.num_device_slots :], *favourites[: pools.num_device_slots]])


def save_popularity(hierarchy: Hierarchy, store: Path) -> None:
    """Write the uses of this session and earlier ones; a session without a use leaves the file unchanged."""
    if hierarchy.counters.num_accesses:
        write_popularity(store, hierarchy.scheduler.uses.counts, hierarchy.pools.keys)
