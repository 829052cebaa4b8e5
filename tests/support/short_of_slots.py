"""A model that reads from disk all the time. Not in `chat`, which is imported where there is no model to load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload_moe import load
from offload_moe.engine.model import Model
from offload_moe.memory import disk


@contextmanager
def short_of_slots(store: Path, num_slots: int) -> Iterator[Model]:
    """Loaded with so few slots that every token reads from disk, in which reads that fail are repeated at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "RETRY_PAUSES_S", (0.001, 0.001))
        with load(store) as whole:
            ram = whole.placement.ram.bytes_with(num_slots)
        with load(store, ram=ram, prefetch=0) as model:
            assert model.engine.hierarchy.ram.residency.num_slots == num_slots
            yield model
