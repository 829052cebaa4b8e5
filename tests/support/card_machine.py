"""A machine whose card is the fake driver's, for `load`: torch's memory on the CPU stands for the card's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import offload_moe.engine.load as engine_load
from offload_moe.card.device import CardDevice
from offload_moe.engine.device_pass import DevicePass
from offload_moe.memory.page_lock import PageLock
from offload_moe.memory.simulated import SimulatedCopier
from support.card_model import SessionLocks
from support.cuda import fake, shim

VRAM = 4 << 30


@contextmanager
def card_machine(patch: pytest.MonkeyPatch, **options: int) -> Iterator[CardDevice]:
    """patch: undoing it ends the machine for what is loaded later. options: of the fake driver."""
    with fake.FakeDriver(adopts=1, **options) as driver:
        device = CardDevice.open(driver.path, fake.nvrtc(), cubins=shim.CACHE / "cubins")
        measure, locks = engine_load.measure_load, PageLock(SessionLocks(device))

        def with_vram(*args: Any, **settings: Any) -> Any:
            return replace(measure(*args, **settings), vram_bytes=VRAM, chosen_dtype=torch.float32)

        def opened(*_: Any, why_off: str, **__: Any) -> DevicePass:
            return DevicePass(reason=why_off) if why_off else DevicePass(card=device)

        patch.setattr(engine_load, "compute_device", lambda name: torch.device("cpu"))
        patch.setattr(engine_load, "measure_load", with_vram)
        patch.setattr(engine_load, "AcceleratorCopier", lambda _: SimulatedCopier(latency_s=0, page_lock=locks))
        patch.setattr(engine_load, "open_device_pass", opened)
        yield device
        device.session.close()
