"""The card of this machine, ready for passes: driver, context and compiler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from offload_moe.card.cubins import Compiler
from offload_moe.card.nvrtc import load_nvrtc
from offload_moe.native.driver import Driver
from offload_moe.native.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class CardDevice:
    """The card that the pass runs on.

    num_processors: multiprocessors of the card. number: of this card, of the `num_cards` of the machine.
    """

    session: Session
    compiler: Compiler
    num_processors: int
    number: int
    num_cards: int
    name: str

    @classmethod
    def open(
        cls, driver: str | None = None, nvrtc: str | None = None, cubins: Path | None = None, *, number: int = 0
    ) -> Self:
        """Card `number`. driver, nvrtc: paths of libraries, the system's by default. cubins: where they are kept.

        Raises: DevicePassUnavailable with the reason, TransferError.
        """
        loaded = Driver(driver)
        card = loaded.card(number)
        architecture = 10 * card.major + card.minor
        found = load_nvrtc(architecture=architecture, driver_version=card.driver_version, path=nvrtc)
        return cls(
            session=Session(loaded, card.device),
            compiler=Compiler(found, architecture, cubins),
            num_processors=card.num_multiprocessors,
            number=number,
            num_cards=card.num_cards,
            name=card.name.decode(errors="replace"),
        )
