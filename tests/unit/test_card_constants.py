"""Constants that kernels of the card have in common with the native library."""

import re

from offload_moe.card.structs import constant
from offload_moe.native.constants import CONSTANTS, GGUF_BLOCKS, GGUF_SUPERBLOCKS
from tests.support.cuda.shim import KERNELS


def test_codecs_activations_and_rotations_are_the_librarys() -> None:
    text = "".join(path.read_text() for path in KERNELS.glob("*.cuh"))
    found = {name: int(value) for name, value in re.findall(r"\b(OM_\w+) = (\d+)", text)}
    shared = found.keys() & CONSTANTS.keys()
    assert {"OM_NF4", "OM_BF16", "OM_Q4_K", "OM_Q6_K", "OM_SILU", "OM_BF16_VALUES", "OM_HALVES", "OM_PAIRS"} <= shared
    assert {name: found[name] for name in shared} == {name: CONSTANTS[name] for name in shared}


def test_superblocks_begin_where_the_librarys_do() -> None:
    assert constant("OM_CARD_SUPERBLOCKS") == min(GGUF_SUPERBLOCKS.values()) > max(GGUF_BLOCKS.values())
