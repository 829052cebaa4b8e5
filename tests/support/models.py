"""Loading a store with so many experts in RAM."""

from pathlib import Path
from typing import Any

from offload_moe import load
from offload_moe.engine.model import Model


def open_model(store: Path, num_slots: int | None = None, **settings: Any) -> Model:
    if num_slots is None:
        return load(store, **settings)
    with load(store) as model:
        ram = model.placement.ram.bytes_with(num_slots)
    return load(store, ram=ram, **settings)
