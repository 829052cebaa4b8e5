"""What the bytes of GGUF's blocks mean, and the product that docs/decisions/120 defines, each stated a second time.

Source of the blocks: ggml, src/ggml-common.h and src/ggml-quants.c, `dequantize_row_*`.
"""

from dataclasses import dataclass

import numpy as np

from tests.support.one_arithmetic import F, fma, quantize

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])  # of IQ4
TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
NUM_BYTES = {
    "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "IQ4_NL": 18, "MXFP4": 17,
    "Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """A weight is d * step * code - least * minimum; steps and minima: of 16 columns each."""

    codes: np.ndarray
    d: np.float32
    least: np.float32
    steps: np.ndarray
    minima: np.ndarray

    def weights(self) -> np.ndarray:
        """fp64, before any rounding."""
        steps, minima = np.repeat(self.steps, 16), np.repeat(self.minima, 16)
        return self.codes * steps * np.float64(self.d) - minima * np.float64(self.least)

    def sizes(self) -> np.ndarray:
        """What roundings are relative to: both terms of each weight."""
        steps, minima = np.repeat(self.steps, 16), np.repeat(self.minima, 16)
        return np.abs(self.codes * steps * np.float64(self.d)) + np.abs(minima * np.float64(self.least))


def block_of(kind: str, raw: np.ndarray) -> Block:
    """One block out of its bytes."""
    b = raw.astype(np.int64)
    half = lambda at: F(raw[at : at + 2].view(np.float16)[0])  # noqa: E731
    ones, none = np.ones(len(b), np.int64), np.zeros(16, np.int64)
    nibbles = lambda packed: np.concatenate([packed & 15, packed >> 4])  # noqa: E731
    bits = lambda packed: np.unpackbits(packed.astype(np.uint8), bitorder="little").astype(np.int64)  # noqa: E731
    halves = lambda packed, size: np.concatenate([nibbles(part) for part in packed.reshape(-1, size)])  # noqa: E731
    match kind:
        case "Q4_0":
            return Block(nibbles(b[2:]) - 8, half(0), F(0), ones[:2], none[:2])
        case "Q4_1":
            return Block(nibbles(b[4:]), half(0), half(2), ones[:2], -ones[:2])
        case "Q5_0":
            return Block((nibbles(b[6:]) | bits(b[2:6]) << 4) - 16, half(0), F(0), ones[:2], none[:2])
        case "Q5_1":
            return Block(nibbles(b[8:]) | bits(b[4:8]) << 4, half(0), half(2), ones[:2], -ones[:2])
        case "Q8_0":
            return Block(raw[2:].view(np.int8).astype(np.int64), half(0), F(0), ones[:2], none[:2])
        case "IQ4_NL":
            return Block(LEVELS[nibbles(b[2:])], half(0), F(0), ones[:2], none[:2])
        case "MXFP4":  # half of these levels, which `product` halves at last
            return Block(TWICE_E2M1[nibbles(b[1:])], F(2.0 ** (b[0] - 127)), F(0), ones[:2], none[:2])
        case "Q2_K":
            codes = [b[16 + 32 * g : 48 + 32 * g] >> 2 * n & 3 for g in range(2) for n in range(4)]
            return Block(np.concatenate(codes), half(80), half(82), b[:16] & 15, b[:16] >> 4)
        case "Q3_K":
            low = [b[32 + 32 * g : 64 + 32 * g] >> 2 * n & 3 for g in range(2) for n in range(4)]
            high = [b[:32] >> n & 1 for n in range(8)]
            packed = b[96:108]
            steps = np.concatenate([packed[:8] & 15, packed[:8] >> 4])
            steps |= np.concatenate([packed[8:] >> 2 * n & 3 for n in range(4)]) << 4
            return Block(np.concatenate(low) + 4 * np.concatenate(high) - 4, half(108), F(0), steps - 32, none)
        case "Q4_K" | "Q5_K":
            steps = [b[4 + j] & 63 for j in range(4)] + [b[12 + j] & 15 | b[4 + j] >> 6 << 4 for j in range(4)]
            minima = [b[8 + j] & 63 for j in range(4)] + [b[12 + j] >> 4 | b[8 + j] >> 6 << 4 for j in range(4)]
            codes = halves(b[16:] if kind == "Q4_K" else b[48:], 32)
            if kind == "Q5_K":
                codes |= np.concatenate([b[16:48] >> n & 1 for n in range(8)]) << 4
            return Block(codes, half(0), half(2), np.repeat(steps, 2), np.repeat(minima, 2))
        case "Q6_K":
            low, high = b[:128].reshape(2, 2, 32), b[128:192].reshape(2, 32)
            parts = [
                (low[g, n % 2] >> 4 * (n // 2) & 15) | (high[g] >> 2 * n & 3) << 4 for g in range(2) for n in range(4)
            ]
            steps = raw[192:208].view(np.int8).astype(np.int64)
            return Block(np.concatenate(parts) - 32, half(208), F(0), steps, none)
        case "IQ4_XS":
            high = b[2] | b[3] << 8
            steps = [(b[4 + n // 2] >> 4 * (n % 2) & 15 | (high >> 2 * n & 3) << 4) - 32 for n in range(8)]
            return Block(LEVELS[halves(b[8:], 16)], half(0), F(0), np.repeat(steps, 2), none)
    raise AssertionError(kind)


def blocks_of(kind: str, row: np.ndarray) -> list[Block]:
    """Of a row's bytes."""
    return [block_of(kind, raw) for raw in row.reshape(-1, NUM_BYTES[kind])]


def weights(kind: str, row: np.ndarray) -> np.ndarray:
    """fp64 of a row's bytes, before any rounding."""
    values = np.concatenate([block.weights() for block in blocks_of(kind, row)])
    return values / 2 if kind == "MXFP4" else values


def product(kind: str, row: np.ndarray, x: np.ndarray) -> np.float32:
    """A row's bytes times fp32 activations, in exact arithmetic but for the roundings that are defined."""
    blocks = blocks_of(kind, row)
    of_blocks = _of_superblocks if len(blocks[0].codes) == 256 else _of_small_blocks
    total = of_blocks(kind, blocks, *quantize(x, 64))
    return F(total / 2) if kind == "MXFP4" else total


def _of_small_blocks(kind: str, blocks: list[Block], quants: np.ndarray, scales: np.ndarray) -> np.float32:
    total = F(0)
    for first in range(0, len(scales), 2):
        segment = None
        for group in range(first, min(first + 2, len(scales))):
            for j in range(2):
                block, q, scale = blocks[2 * group + j], quants[group, 32 * j : 32 * j + 32], scales[group]
                p, s = F(block.d * scale), F(int((block.codes * q).sum()))
                segment = F(s * p) if segment is None else fma(s, p, segment)
                if kind in ("Q4_1", "Q5_1"):
                    segment = fma(F(int(q.sum())), F(block.least * scale), segment)
        total = F(total + segment)
    return total


def _of_superblocks(kind: str, blocks: list[Block], quants: np.ndarray, scales: np.ndarray) -> np.float32:
    total = F(0)
    for index, block in enumerate(blocks):
        sums, below = F(0), F(0)
        for part in range(4):
            q, scale, inside = quants[4 * index + part], scales[4 * index + part], slice(4 * part, 4 * part + 4)
            each = (block.codes[64 * part : 64 * part + 64] * q).reshape(4, 16).sum(1)
            sums = fma(F(int((block.steps[inside] * each).sum())), scale, sums)
            below = fma(F(-int((block.minima[inside] * q.reshape(4, 16).sum(1)).sum())), scale, below)
        total = fma(sums, block.d, total)
        if kind in ("Q2_K", "Q4_K", "Q5_K"):
            total = fma(below, block.least, total)
    return total
