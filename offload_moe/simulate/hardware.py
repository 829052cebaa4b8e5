"""Common cards and links: published figures, and the assumed shares of them that are reached."""

import re
from dataclasses import dataclass

from offload_moe.errors import ConfigError
from offload_moe.system.names import choice

GPU_SHARE = 0.7  # of a card's memory bandwidth, by matrix-vector kernels that read 4-bit weights: assumed
FLOPS_SHARE = 0.4  # of a card's matrix arithmetic, by prompts of some hundred tokens: assumed
LINK_SHARE = 0.8  # of a link's raw rate, by copies from page-locked memory: 25 GB/s of PCIe 4.0 x16
# GB/s of one lane, after encoding. Source: PCI Express Base Specification 3.0, 4.0, 5.0 (8, 16, 32 GT/s, 128b/130b).
LANE_GBPS = {3: 8 / 8 * 128 / 130, 4: 16 / 8 * 128 / 130, 5: 32 / 8 * 128 / 130}

TURING = "NVIDIA T4 datasheet"
AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, and the GeForce RTX 30 product pages"
ADA = "NVIDIA Ada GPU Architecture whitepaper, and the GeForce RTX 40 product pages"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, and the GeForce RTX 50 product pages"
A100 = "NVIDIA A100 80GB PCIe datasheet"
A6000 = "NVIDIA RTX A6000 datasheet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Published figures. tflops: dense fp16 matrix products with fp32 sums. pcie: generation and lanes."""

    name: str
    vram_gib: int
    memory_gbps: float
    tflops: float
    pcie: tuple[int, int]
    source: str

    @property
    def link(self) -> str:
        return "{}x{}".format(*self.pcie)


def _card(name: str, vram: int, gbps: float, tflops: float, pcie: tuple[int, int], source: str) -> Card:
    return Card(name=name, vram_gib=vram, memory_gbps=gbps, tflops=tflops, pcie=pcie, source=source)


CARDS = {
    card.name: card
    for card in (
        _card("t4", 16, 320, 65, (3, 16), TURING),
        _card("rtx-3060", 12, 360, 25.5, (4, 16), AMPERE),
        _card("rtx-3070", 8, 448, 40.6, (4, 16), AMPERE),
        _card("rtx-3080", 10, 760, 59.5, (4, 16), AMPERE),
        _card("rtx-3090", 24, 936, 71, (4, 16), AMPERE),
        _card("rtx-a6000", 48, 768, 77.4, (4, 16), A6000),
        _card("rtx-4060-ti-16gb", 16, 288, 44.1, (4, 8), ADA),
        _card("rtx-4070", 12, 504, 58.3, (4, 16), ADA),
        _card("rtx-4070-ti", 12, 504, 80.2, (4, 16), ADA),
        _card("rtx-4080", 16, 717, 97.5, (4, 16), ADA),
        _card("rtx-4090", 24, 1008, 165, (4, 16), ADA),
        _card("rtx-5070-ti", 16, 896, 87.9, (5, 16), BLACKWELL),
        _card("rtx-5080", 16, 960, 113, (5, 16), BLACKWELL),
        _card("rtx-5090", 32, 1792, 210, (5, 16), BLACKWELL),
        _card("a100-80gb", 80, 1935, 156, (4, 16), A100),
    )
}


def card_named(name: str) -> Card:
    """A card of the table, by any form of its name: `rtx-4090`, `4090`, `NVIDIA GeForce RTX 4090`.

    Raises: ConfigError when it is not in the table.
    """
    cards = {_plain(known): known for known in CARDS}
    known = cards.get(_plain(name))
    return CARDS[choice("card", name if known is None else known, CARDS)]


def _plain(name: str) -> str:
    """A card's name without its maker, its product line and separators."""
    words = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce|tesla)?(rtx)?", "", words)


def link_bytes_per_s(text: str) -> float:
    """``"4x16"``, generation and lanes, of whose rate copies reach four fifths; or the reached GB/s, ``"21.5"``.

    Raises: ConfigError when it is neither.
    """
    match = re.fullmatch(r"([345])x(1|2|4|8|16)", text.strip().lower())
    if match is not None:
        return LANE_GBPS[int(match[1])] * int(match[2]) * LINK_SHARE * 1e9
    return gigabytes_per_s("--pcie", text, "4x16, 5x8 or 25")


def gigabytes_per_s(flag: str, text: str, examples: str = "40 or 3.5") -> float:
    """A rate in GB/s as bytes per second. Raises: ConfigError when it is not a positive number."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise ConfigError(f"{flag} {text!r} is not a rate. Write it like {examples}.")
    return rate * 1e9
