"""`load(device="cuda")` to text through the device pass, on the fake driver; and the line that says why there is none."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import SessionLocks
from support.cuda import fake, shim
from support.demo import demo_path

import offload_moe.engine.load as engine_load
from offload_moe import load
from offload_moe.card.device import CardDevice
from offload_moe.engine.device_pass import DevicePass, open_device_pass
from offload_moe.memory.page_lock import PageLock
from offload_moe.memory.simulated import SimulatedCopier

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
VRAM = 8 << 20


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[CardDevice]:
    """A machine whose `cuda` is the fake driver's; torch's memory on the CPU stands for the card's."""
    with fake.FakeDriver(adopts=1) as driver:
        device = CardDevice.open(driver.path, fake.nvrtc(), cubins=shim.CACHE / "cubins")
        measure = engine_load.measure_load

        def with_vram(*args: Any, **settings: Any) -> Any:
            machine = measure(*args, **settings)
            return replace(machine, vram=VRAM)

        monkeypatch.setattr(engine_load, "compute_device", lambda name: torch.device("cpu"))
        monkeypatch.setattr(engine_load, "measure_load", with_vram)
        monkeypatch.setattr(
            engine_load,
            "AcceleratorCopier",
            lambda _: SimulatedCopier(latency_s=0, page_lock=PageLock(SessionLocks(device))),
        )
        monkeypatch.setattr(engine_load, "open_device_pass", lambda *_, **__: DevicePass(card=device))
        yield device
        device.session.close()
