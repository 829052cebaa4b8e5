"""Where replicas belong: one on each node of a cluster, or one for each of its GPUs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one replica. node: its id. num_cpus, num_gpus: what the replica takes of the node."""

    node: str
    address: str
    number: int
    num_cpus: int
    num_gpus: int


def slots_of(nodes: Iterable[Mapping[str, Any]], *, uses_gpus: bool = True, has_ram_limit: bool = True) -> list[Slot]:
    """Of what `ray.nodes` returns. Nodes without a CPU to give (`ray start --num-cpus 0`) have none.

    has_ram_limit: whether a replica has a limit of RAM; one without takes what is free, so there is one for a node.
    """
    slots: list[Slot] = []
    for node in nodes:
        resources = node.get("Resources", {})
        num_cpus = int(resources.get("CPU", 0))
        if not node.get("Alive") or not num_cpus:
            continue
        num_gpus = int(resources.get("GPU", 0)) if uses_gpus else 0
        count = max(1, num_gpus) if has_ram_limit else 1
        for number in range(count):
            cpus = max(1, num_cpus // count)
            slots.append(Slot(node["NodeID"], node["NodeManagerAddress"], number, cpus, min(1, num_gpus)))
    return slots
