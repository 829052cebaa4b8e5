"""A machine whose card is the fake driver's, for `load`: torch's memory on the CPU stands for the card's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import offload_moe.engine.load as engine_load
from offload_moe.card.device import CardDevice
from offload_moe.engine.build import pools_of
from offload_moe.engine.device_pass import DevicePass
from offload_moe.memory.page_lock import LockRuntime, PageLock
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.residency.hierarchy import Pools
from support.card_model import SessionLocks
from support.cuda import fake, shim

VRAM = 4 << 30


@dataclass
class Vram:
    """Of the machine. budget_bytes: for `load`. capacity_bytes: for slots, what other programs have included.

    slots_per_chunk: of the pool. copiers: of what was loaded.
    """

    budget_bytes: int = VRAM
    capacity_bytes: int = 1 << 50
    elsewhere_bytes: int = 0
    slots_per_chunk: int = 1 << 20
    copiers: list[SimulatedCopier] = field(default_factory=list)

    def left_bytes(self) -> int:
        return self.capacity_bytes - self.elsewhere_bytes


@contextmanager
def card_machine(
    patch: pytest.MonkeyPatch,
    vram: Vram | None = None,
    page_locks: Callable[[CardDevice], LockRuntime] = SessionLocks,
    **options: int,
) -> Iterator[CardDevice]:
    """patch: undoing it ends the machine for what is loaded later. options: of the fake driver."""
    memory = vram or Vram()
    with fake.FakeDriver(adopts=1, **options) as driver:
        device = CardDevice.open(driver.path, fake.nvrtc(), cubins=shim.CACHE / "cubins")
        measure, locks = engine_load.measure_load, PageLock(page_locks(device))

        def with_vram(*args: Any, **settings: Any) -> Any:
            return replace(measure(*args, **settings), vram_bytes=memory.budget_bytes, chosen_dtype=torch.float32)

        def in_chunks(*args: Any, slot_bytes: int, **settings: Any) -> Pools:
            chunk_bytes = memory.slots_per_chunk * slot_bytes
            return replace(pools_of(*args, slot_bytes=slot_bytes, **settings), chunk_bytes=chunk_bytes)

        def copier(_: torch.device) -> SimulatedCopier:
            memory.copiers.append(SimulatedCopier(latency_s=0, page_lock=locks, capacity=memory.left_bytes))
            return memory.copiers[-1]

        def opened(*_: Any, why_off: str, **__: Any) -> DevicePass:
            return DevicePass(reason=why_off) if why_off else DevicePass(card=device)

        patch.setattr(engine_load, "compute_device", lambda name: torch.device("cpu"))
        patch.setattr(engine_load, "measure_load", with_vram)
        patch.setattr(engine_load, "pools_of", in_chunks)
        patch.setattr(engine_load, "AcceleratorCopier", copier)
        patch.setattr(engine_load, "open_device_pass", opened)
        yield device
        device.session.close()
