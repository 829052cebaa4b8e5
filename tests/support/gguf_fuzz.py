"""Headers of GGUF files that are nearly right: keys, values and places of tensors changed, whole or byte by byte."""

import os
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from tests.support.fuzz import mutated_bytes

Number = int | float
WHOLE = [0, 1, 2, 3, 5, 7, 63, 255, 257, 511, 4096, 2**16, 2**24, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, -1]
REAL = [0.0, -0.0, -1.0, 0.5, 1e-38, 1e38, 1e300, float("inf"), float("nan")]
TEXTS = ["", "x", "yarn", "linear", "llama", "gpt2", "qwen2", "\x1b[31m", "\ud7ff" * 300, "{% for x in range(9) %}"]
FORMATS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
NEVER = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")  # only byte by byte: long lists


@dataclass(frozen=True, slots=True)
class Sample:
    """The header of a valid file in pieces, and how many bytes lie behind it."""

    keys: tuple[tuple[bytes, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    data_bytes: int

    @classmethod
    def of(cls, path: Path) -> "Sample":
        reader = gguf.GGUFReader(path)
        keys = []
        for name, field in reader.fields.items():
            if not name.startswith("GGUF."):
                _, _, *value = field.parts
                keys.append((name.encode(), b"".join(part.tobytes() for part in value)))
        tensors = [
            (t.name.encode(), tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset - reader.data_offset))
            for t in reader.tensors
        ]
        return cls(tuple(keys), tuple(tensors), path.stat().st_size - reader.data_offset)


def write_mutated(sample: Sample, path: Path, randomness: random.Random) -> None:
    """A file with zeros in place of data, and a header with a few changes."""
    keys, tensors = list(sample.keys), list(sample.tensors)
    counts = [len(tensors), len(keys)]
    for _ in range(randomness.choice([1, 1, 1, 2, 3])):
        match randomness.randrange(8):
            case 0:
                _change_tensor(tensors, randomness)
            case 1:
                counts[randomness.randrange(2)] += randomness.choice([-1, 1, 2**20, 2**40])
            case _:
                _change_key(keys, randomness)
    if counts[0] == len(sample.tensors):
        counts = [len(tensors), len(keys)]
    header = b"GGUF" + struct.pack("<IQQ", 3, *(max(0, count) for count in counts))
    header += b"".join(_text(name) + value for name, value in keys)
    header += b"".join(
        _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)
        for name, shape, kind, start in tensors
    )
    if randomness.random() < 0.15:
        header = mutated_bytes(header, randomness)
    path.write_bytes(header)
    num_bytes = len(header) + 32 + sample.data_bytes
    os.truncate(path, num_bytes if randomness.random() < 0.97 else randomness.randrange(num_bytes))


def _change_key(keys: list[tuple[bytes, bytes]], randomness: random.Random) -> None:
    index = randomness.choice([n for n, (name, _) in enumerate(keys) if name.decode() not in NEVER])
    name, value = keys[index]
    match randomness.randrange(10):
        case 0:
            del keys[index]
        case 1:
            keys.insert(index, randomness.choice(keys))
        case 2:
            keys[index] = (name, randomness.choice(keys)[1])
        case 3:
            keys[index] = (randomness.choice(keys)[0], value)
        case _:
            keys[index] = (name, _value(randomness))


def _value(randomness: random.Random) -> bytes:
    match randomness.randrange(6):
        case 0:
            return struct.pack("<I", 8) + _text(randomness.choice(TEXTS).encode())
        case 1:
            numbers = [randomness.choice(WHOLE[:8]) for _ in range(randomness.randrange(6))]
            count = randomness.choice([len(numbers)] * 5 + [2**20, 2**62])
            return struct.pack("<IIQ", 9, FORMATS["I"], count) + struct.pack(f"<{len(numbers)}I", *numbers)
        case 2:
            form = randomness.choice("fd")
            with np.errstate(over="ignore"):
                number = randomness.choice(REAL)
                number = float(np.float32(number)) if form == "f" else number
            return struct.pack(f"<I{form}", FORMATS[form], number)
        case _:
            form = randomness.choice("BbHhIIIiQq?")
            number = randomness.choice(WHOLE)
            return (
                struct.pack("<I", FORMATS[form])
                + struct.pack("<q", number - 2**64 * (number >= 2**63))[: struct.calcsize(f"<{form}")]
            )


def _change_tensor(tensors: list[tuple[bytes, tuple[int, ...], int, int]], randomness: random.Random) -> None:
    index = randomness.randrange(len(tensors))
    name, shape, kind, start = tensors[index]
    match randomness.randrange(7):
        case 0:
            del tensors[index]
        case 1:
            name = randomness.choice([b"", b"x", name + b"x", randomness.choice(tensors)[0]])
        case 2:
            kind = randomness.choice([0, 1, 2, 8, 14, 16, 24, 26, 30, 39, 40, 99, 2**32 - 1])
        case 3:
            start = randomness.choice([0, 1, start + 1, start + 32, 2**40, 2**63, 2**64 - 1])
        case 4:
            shape = shape[::-1]
        case 5:
            shape = _changed_shape(shape, randomness)
        case _:
            shape = tuple(randomness.choice([n for n in WHOLE if n >= 0]) for _ in range(randomness.randrange(6)))
    if index < len(tensors):
        tensors[index] = (name, shape, kind, start)


def _changed_shape(shape: Sequence[int], randomness: random.Random) -> tuple[int, ...]:
    changed = list(shape)
    changed[randomness.randrange(len(shape))] += randomness.choice([-32, -1, 1, 256])
    return tuple(max(0, size) for size in changed)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
