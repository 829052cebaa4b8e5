"""Readers of foreign files: whatever is in them, it is read or refused by name, and nothing else is opened.

Structure-aware: valid documents with a few places changed, most with the checks of the first stage made right again.
The inputs follow from seeds, so a failure names the seed that repeats it.
"""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload_moe.checkpoint.shards import Shards
from offload_moe.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from offload_moe.convert.quantize import quantize
from offload_moe.errors import OffloadMoeError
from offload_moe.store import Store
from offload_moe.store.journal import JOURNAL_NAME, Journal
from offload_moe.store.manifest_json import MANIFEST_NAME
from tests.support.checkpoints import write_checkpoint
from tests.support.fuzz import mutated, mutated_bytes, opened_files, to_bytes
from tests.support.stores import check_all

SETTINGS = {"source": "tiny", "codec": "nf4"}
CODE = (".py", ".pyc", ".so")  # Python's own imports
QUICK, MANY = 150, 3000
Fuzzer = Callable[[Path, random.Random], bool]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    sizes = {"num_hidden_layers": 1, "num_experts": 2, "num_local_experts": 2}
    write_checkpoint(root / "single", shard_size="1GB", **sizes)
    write_checkpoint(root / "sharded", shard_size="12KB", **sizes)
    quantize(root / "single", root / "store", codec="nf4", dense_codec="int8")
    (root / "journal").mkdir()
    for name in ("single", "sharded", "store"):
        path = root / name / {"single": SINGLE_NAME, "sharded": INDEX_NAME, "store": MANIFEST_NAME}[name]
        path.rename(root / name / "original")
    return root


def fuzz_header(root: Path, randomness: random.Random) -> bool:
    """A safetensors file whose header is changed; the data stays, or is cut."""
    folder = root / "single"
    content = (folder / "original").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, data = content[8:end], content[end:]
    if is_rough := randomness.random() < 0.2:
        header = mutated_bytes(header, randomness)
    else:
        header = to_bytes(mutated(json.loads(header), randomness, randomness.randint(1, 3)))
    length = len(header) if randomness.random() < 0.95 else randomness.choice([0, 7, len(header) + 1, 2**40, 2**64 - 1])
    data = data[: randomness.randrange(len(data))] if randomness.random() < 0.1 else data
    (folder / SINGLE_NAME).write_bytes(length.to_bytes(8, "little") + header + data)
    read_shards(folder)
    return not is_rough and length == len(header)


def fuzz_index(root: Path, randomness: random.Random) -> bool:
    folder = root / "sharded"
    original = (folder / "original").read_bytes()
    if is_rough := randomness.random() < 0.2:
        text = mutated_bytes(original, randomness)
    else:
        text = to_bytes(mutated(json.loads(original), randomness, randomness.randint(1, 3)))
    (folder / INDEX_NAME).write_bytes(text)
    read_shards(folder)
    return not is_rough


def fuzz_manifest(root: Path, randomness: random.Random) -> bool:
    folder = root / "store"
    original = (folder / "original").read_bytes()
    if is_rough := randomness.random() < 0.2:
        text = mutated_bytes(original, randomness)
    else:
        text = to_bytes(with_checksum(mutated(json.loads(original), randomness, randomness.randint(1, 3))))
    (folder / MANIFEST_NAME).write_bytes(text)
    read_store(folder)
    return not is_rough


def fuzz_journal(root: Path, randomness: random.Random) -> bool:
    folder = root / "journal"
    settings: Any = SETTINGS if randomness.random() < 0.6 else mutated(SETTINGS, randomness, 1)
    lines = b"".join(b"%08x\n" % randomness.getrandbits(32) for _ in range(randomness.randrange(5)))
    content = json.dumps(settings, sort_keys=True).encode() + b"\n" + mutated_bytes(lines, randomness)
    (folder / JOURNAL_NAME).write_bytes(content)
    journal = Journal(folder, SETTINGS)
    try:
        assert all(0 <= checksum < 2**32 for checksum in journal.checksums)
        journal.append(5)
        assert journal.checksums[-1] == 5
    finally:
        journal.close()
    return settings == SETTINGS


def with_checksum(document: Any) -> Any:
    if isinstance(document, dict):
        document.pop("checksum", None)
        document["checksum"] = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    return document


def read_shards(folder: Path) -> None:
    shards = Shards(folder)
    try:
        for name, entry in shards.entries.items():
            assert shards.read(name).shape == entry.shape
    finally:
        shards.close()


def read_store(folder: Path) -> None:
    store = Store.open(folder)
    for layer in range(len(store.layers)):
        store.read_expert(layer, 0)
    for _ in store.dense_tensors():
        pass
    check_all(store)


FUZZERS: dict[str, Fuzzer] = {
    "header": fuzz_header,
    "index": fuzz_index,
    "manifest": fuzz_manifest,
    "journal": fuzz_journal,
}


def fuzz(name: str, root: Path, seeds: range) -> int:
    """How many inputs passed the first stage."""
    passed = 0
    for seed in seeds:
        with opened_files() as opened:
            try:
                passed += FUZZERS[name](root, random.Random(seed))
            except OffloadMoeError as error:
                passed += not is_first_stage(str(error))
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
        outside = [path for path in opened if not path.is_relative_to(root.resolve()) and path.suffix not in CODE]
        assert not outside, f"{name}, seed {seed}: opened {outside}"
    return passed


def is_first_stage(message: str) -> bool:
    """Refused for what the text is, before anything that it says was looked at."""
    stages = (
        "malformed header",
        "not a safetensors file",
        "is damaged",
        "does not match its own checksum",
        "does not describe",
        "is not a shard index",
        "begun with another",
    )
    return any(stage in message for stage in stages)


@pytest.mark.parametrize("name", FUZZERS)
def test_nearly_right_files_are_read_or_refused(name: str, folders: Path) -> None:
    assert fuzz(name, folders, range(QUICK)) > 0.3 * QUICK


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_many_nearly_right_files(name: str, folders: Path) -> None:
    assert fuzz(name, folders, range(QUICK, QUICK + MANY)) > 0.3 * MANY
