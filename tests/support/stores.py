"""What tests need of expert stores."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from offload_moe.store import Store
from offload_moe.store.manifest import Place
from offload_moe.store.manifest_json import manifest_to_json
from offload_moe.system.paths import MANIFEST_NAME


def check_all(store: Store) -> None:
    """Read everything and compare it with its checksum. Raises: StoreCorrupt."""
    for piece in store.pieces():
        piece.check()


def assert_same_stores(first: Path, second: Path) -> None:
    """Every record and dense tensor has the same bytes."""
    a, b = Store.open(first), Store.open(second)
    assert list(a.dense) == list(b.dense)
    for name in a.dense:
        assert a.dense[name].dtype == b.dense[name].dtype
        assert torch.equal(a.read_dense(name), b.read_dense(name)), name
    for ordinal, layer in enumerate(b.layers):
        for expert in range(layer.num_experts):
            assert torch.equal(a.read_expert(ordinal, expert), b.read_expert(ordinal, expert)), (ordinal, expert)


def to_version_1(folder: Path) -> Path:
    """Change a store in place into the one that version 1 wrote of the same checkpoint."""
    store = Store.open(folder)
    manifest, checksums = store.manifest, {}
    for piece in store.pieces():
        if piece.panels is not None and manifest.files[piece.place.file].order == "panels":
            with piece.path.open("r+b") as file:
                file.seek(piece.place.offset)
                record = torch.frombuffer(bytearray(file.read(piece.place.num_bytes)), dtype=torch.uint8)
                piece.panels.to_rows(record)
                file.seek(piece.place.offset)
                file.write(record.numpy().tobytes())
            checksums[piece.place] = zlib.crc32(record.numpy())

    def in_rows(place: Place) -> Place:
        return replace(place, checksum=checksums.get(place, place.checksum))

    manifest = replace(
        manifest,
        experts=tuple(map(in_rows, manifest.experts)),
        dense=tuple(replace(entry, place=in_rows(entry.place)) for entry in manifest.dense),
    )
    document = json.loads(manifest_to_json(manifest))
    document |= {"version": 1, "files": [fields[:3] for fields in document["files"]]}
    del document["checksum"]
    document["checksum"] = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    return folder
