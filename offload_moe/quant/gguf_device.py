"""Records of GGUF's types on a device: their panels back to rows, and rows decoded to numbers, with torch's operations.

For the types that a card has kernels for. The numbers are those of the `gguf` package, bit for bit.

Shape legend: R rows, C chunks of a row, B blocks of a row, K columns.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offload_moe.quant.gguf import GgufType, decode_rows
from offload_moe.quant.panels import rows_of_parts

MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values


def _halves_of_q6_k() -> list[int]:
    places = [192 + 2 * i for i in range(8)]
    for v in range(16):
        low = v // 8 * 64 + v % 8 * 4
        places += [start + offset for start in (low, low + 32, 128 + 4 * v) for offset in (0, 2)]
    return places


# Where in a file's chunk the halves of the dwords of a panel lie, and the bytes beside them: docs/decisions/120.
_HALVES: Mapping[str, list[int]] = {
    "Q8_0": [0, 34, *range(2, 34, 2), *range(36, 68, 2)],
    "MXFP4": [*range(1, 17, 2), *range(18, 34, 2)],
    "Q4_K": [*range(0, 144, 2)],
    "Q6_K": _halves_of_q6_k(),
}
_SIDES = {"Q6_K": (208, 209), "MXFP4": (0, 17)}


def rows_of_panels(kind: GgufType, panels: Tensor, num_rows: int, rows: slice) -> Tensor:
    """Rows of a part of a record in panels, uint8 flat -> as they lie in a file, ``[R, row bytes]``."""
    places = torch.tensor(_HALVES[kind.name], device=panels.device)
    dword_bytes = len(panels) // kind.num_bytes * kind.num_dwords * 4
    dwords = rows_of_parts(panels[:dword_bytes].view(torch.int32), num_rows, 1, rows)
    chunks = dwords.view(torch.uint8).view(len(dwords), -1, kind.num_dwords * 2, 2)
    found = panels.new_empty(*chunks.shape[:2], kind.num_bytes)
    for byte in range(2):
        found[:, :, places + byte] = chunks[..., byte]
    if kind.name in _SIDES:
        sides = rows_of_parts(panels[dword_bytes:].view(torch.int16), num_rows, 1, rows).view(torch.uint8)
        found[:, :, list(_SIDES[kind.name])] = sides.view(*chunks.shape[:2], 2)
    return found.view(len(found), -1)


def decode_anywhere(kind: GgufType, rows: Tensor) -> Tensor:
    """uint8 ``[R, row bytes]`` -> fp32 ``[R, K]``, where they lie."""
    return decode_rows(kind, rows) if rows.is_cpu else decode_on_device(kind, rows)


def decode_on_device(kind: GgufType, rows: Tensor) -> Tensor:
    """uint8 ``[R, row bytes]`` -> fp32 ``[R, K]``."""
    block_bytes = kind.num_bytes if kind.columns == 256 else kind.num_bytes // 2
    blocks = rows.contiguous().view(-1, block_bytes)
    return _DECODERS[kind.name](blocks).reshape(len(rows), -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """fp16 of each block -> fp32 ``[B, 1]``."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """``[B, n * run]`` -> ``[B, n, 2, run]``: low ones, then high ones."""
    runs = codes.view(len(codes), -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], dim=2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _mxfp4(blocks: Tensor) -> Tensor:
    levels = torch.tensor(MXFP4_LEVELS, dtype=torch.float32, device=blocks.device)
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1).clamp(min=0) << 23)
    codes = _nibbles(blocks[:, 1:].contiguous(), 16).reshape(len(blocks), 32)
    return bits.view(torch.float32) * levels[codes.int()]


def _q4_k(blocks: Tensor) -> Tensor:
    low, second, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, high & 15 | low >> 2 & 48], dim=1)
    mins = torch.cat([second & 63, high >> 4 | second >> 2 & 48], dim=1)
    steps, least = _half(blocks, 0) * scales.float(), _half(blocks, 2) * mins.float()
    codes = _nibbles(blocks[:, 16:].contiguous(), 32).view(-1, 8, 32).float()
    return steps[..., None] * codes - least[..., None]


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].contiguous(), 64).view(-1, 2, 4, 32)
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    codes = low | torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2) << 4
    steps = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return steps[..., None] * (codes.float() - 32.0).view(-1, 16, 16)


_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "MXFP4": _mxfp4, "Q4_K": _q4_k, "Q6_K": _q6_k}
ON_DEVICE = frozenset(_DECODERS)  # names of the types
