"""Inputs that are nearly right: JSON documents with a few places changed, so that most pass the first checks."""

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, -1, 3, 4096, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e400, float("nan")]
TEXTS = ["", "x", "F32", "U8", "F8_E4M3", "../x", "/etc/passwd", "..", ".", "a/../../b", "a\0b", "\ud800", "é" * 300]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"": {}}, [0, 1], [0] * 9]


def mutated(document: Any, randomness: random.Random, num_changes: int) -> Any:
    """A copy of a JSON document with that many places changed."""
    result = copy.deepcopy(document)
    for _ in range(num_changes):
        places = list(_places(result))
        if not places:
            return randomness.choice(OTHERS)
        owner, key = randomness.choice(places)
        _change(owner, key, randomness)
    return result


def mutated_bytes(data: bytes, randomness: random.Random) -> bytes:
    """A flipped bit, a cut, a repeated piece or something in between."""
    changed = bytearray(data)
    for _ in range(randomness.randint(1, 4)):
        start, end = sorted(randomness.randrange(len(changed) + 1) for _ in range(2))
        match randomness.randrange(4):
            case 0 if changed:
                changed[start - 1] ^= 1 << randomness.randrange(8)
            case 1:
                del changed[start : min(end, start + 8)]
            case 2:
                changed[start:start] = changed[start : min(end, start + 64)]
            case _:
                changed[start:start] = randomness.randbytes(randomness.randint(1, 8))
    return bytes(changed)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys, all through the document."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(owner: Any, key: Any, randomness: random.Random) -> None:
    value = owner[key]
    match randomness.randrange(8):
        case 0:
            del owner[key]
        case 1 if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(value))
        case 1 | 2 if isinstance(owner, dict):
            owner[randomness.choice(TEXTS)] = owner.pop(key)
        case 3 | 4 if type(value) is int:
            owner[key] = value + randomness.choice([-4096, -64, -1, 1, 64, 4096])
        case 3 if isinstance(value, str):
            owner[key] = value + randomness.choice(TEXTS)
        case 5:
            owner[key] = randomness.choice(OTHERS)
        case 6:
            owner[key] = randomness.choice(TEXTS)
        case _:
            owner[key] = randomness.choice(NUMBERS)


def to_bytes(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode()


_watchers: list[Callable[[str], None]] = []
_is_installed = False


@contextmanager
def opened_files() -> Iterator[set[Path]]:
    """Every path that this process opens meanwhile."""
    global _is_installed  # an audit hook cannot be taken away again
    if not _is_installed:
        sys.addaudithook(lambda event, arguments: _watch(arguments[0]) if event == "open" else None)
        _is_installed = True
    found: set[Path] = set()
    _watchers.append(lambda path: found.add(Path(path).resolve()))
    try:
        yield found
    finally:
        _watchers.pop()


def _watch(path: object) -> None:
    if isinstance(path, str | Path):
        for watcher in _watchers:
            watcher(str(path))
