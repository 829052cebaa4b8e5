"""Whether a model on a card takes the device pass, and the reason where it does not."""

from dataclasses import dataclass, replace

import torch

from offload_moe.card.build import install
from offload_moe.card.device import CardDevice
from offload_moe.card.passes import CardPass
from offload_moe.decode import FastPath
from offload_moe.decode.report import LayerPath
from offload_moe.engine.build import Engine
from offload_moe.errors import BudgetError, DevicePassUnavailable, TransferError
from offload_moe.store import Store
from offload_moe.system.progress import Progress


@dataclass(slots=True)
class DevicePass:
    """Whether there is a device pass.

    card: ready for passes; None where there are none, for this reason, which is empty without a card.
    """

    card: CardDevice | None = None
    reason: str = ""
    made: CardPass | None = None

    @property
    def notices(self) -> list[str]:
        """Messages for the user."""
        if self.reason:
            return [f"The device pass does not serve this model: {self.reason}. Decode takes the path of prompts."]
        found = []
        if self.made is not None and (why := self.made.parts.why_no_head):
            found.append(
                f"The device pass ends before the output head: {why}. Torch computes the logits of each token."
            )
        if self.made is not None and self.card is not None and self.card.num_cards > 1:
            used = f"cuda:{self.card.number} ({self.card.name})"
            found.append(f"This machine has {self.card.num_cards} cards; {used} is used. --device chooses another.")
        return found


def open_device_pass(device: torch.device, *, why_off: str) -> DevicePass:
    """Look for a card before anything is loaded. why_off: the plan's reason why there shall be none."""
    if device.type != "cuda":
        return DevicePass()
    if torch.version.hip is not None:
        return DevicePass(reason="the kernels are for NVIDIA's cards")
    if why_off:
        return DevicePass(reason=why_off)
    try:
        return DevicePass(card=CardDevice.open(number=device.index or 0))
    except (DevicePassUnavailable, TransferError) as error:
        return DevicePass(reason=str(error).rstrip("."))


def install_device_pass(
    device_pass: DevicePass, store: Store, engine: Engine, context: int, progress: Progress
) -> None:
    """Compile the kernels and make the graphs; lock what RAM can be locked."""
    if device_pass.card is None:
        return
    try:
        progress("Compiling the kernels of the device pass")
        codecs = [store.codec_of(index) for index in range(len(engine.layers))]
        device_pass.made = install(
            engine.hf, engine.layers, engine.hierarchy, codecs, device_pass.card, context=context
        )
    except (DevicePassUnavailable, BudgetError, TransferError) as error:
        device_pass.reason = str(error).rstrip(".")
        return
    lock_ram(engine, progress)


def lock_ram(engine: Engine, progress: Progress) -> None:
    """Page-lock the arena, chunk by chunk, so that the card reads records there; a refusal is no error."""
    hierarchy, first = engine.hierarchy, 0
    slot_bytes, num_slots = hierarchy.arena.slot_bytes, hierarchy.num_slots("ram")
    for num_in_chunk in hierarchy.arena.chunk_sizes:
        progress("Locking RAM for the card", first * slot_bytes, num_slots * slot_bytes)
        if not hierarchy.is_direct(first):
            break
        first += num_in_chunk
    progress("Locking RAM for the card", num_slots * slot_bytes, num_slots * slot_bytes)


def report_of(report: FastPath) -> FastPath:
    """The report of a model whose layers take the device pass."""
    return replace(
        report, why_none="", layers=tuple(LayerPath(kind="card", name=layer.name) for layer in report.layers)
    )
