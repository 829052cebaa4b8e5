"""What a conversion writes down: the settings that a resumed one must share, and the manifest."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.source import Source
from offload_moe.convert.jobs import expert_name
from offload_moe.store.in_place import GGUF
from offload_moe.store.manifest import MTP, DenseEntry, Importances, Layer, Manifest, MergedAdapter
from offload_moe.store.manifest_json import FORMAT_VERSION
from offload_moe.store.plan import PlannedFile
from offload_moe.store.writer import StoreWriter, describe_metadata, stored_files
from offload_moe.system.paths import CONFIG_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """How the matrices of a store are quantized, and what of."""

    codec: str
    dense_codec: str
    scales: str
    importances: Importances | None
    adapter: MergedAdapter | None


def settings_of(
    origin: Source,
    checkpoint: Checkpoint,
    chosen: Chosen,
    files: Iterable[PlannedFile],
    *,
    is_download: bool,
) -> dict[str, Any]:
    """Settings that must be equal to resume a conversion; the keys appear in the error message."""
    plan = hashlib.sha256(b"".join(file.header for file in files)).hexdigest()
    settings = {
        "format version": FORMAT_VERSION,
        "source": origin.name,
        "revision": origin.revision,
        "codec": chosen.codec,
        "dense codec": chosen.dense_codec,
        "scales": chosen.scales,
        "layout": plan,
    }
    if chosen.importances is not None:
        settings["importances"] = asdict(chosen.importances)
    if chosen.adapter is not None:
        settings["adapter"] = asdict(chosen.adapter)
    if is_download:  # a commit never changes, while its shards are downloaded and deleted
        return settings | {"--delete-source-shards": True}
    small = (origin.folder / CONFIG_NAME,) if checkpoint.gguf is None else ()  # of a GGUF file it is made at each run
    stats = [(path.name, path.stat()) for path in (*checkpoint.tensors.paths, *small)]
    state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return settings | {"state of the source files": state}


def manifest_of(
    origin: Source,
    checkpoint: Checkpoint,
    chosen: Chosen,
    files: Sequence[PlannedFile],
    writer: StoreWriter,
    metadata: dict[str, bytes],
) -> Manifest:
    """The manifest of a conversion whose blobs are all written."""
    blobs = {blob.name: blob for file in files for blob in file.blobs}
    places = dict(zip(blobs, writer.places(), strict=True))
    layers = [(layer.name, layer) for layer in checkpoint.layers]
    if checkpoint.mtp is not None and chosen.codec != GGUF:
        layers += [(MTP + layer.name, layer) for layer in checkpoint.mtp.layers]
    names = [expert_name(index, e) for index, (_, layer) in enumerate(layers) for e in range(layer.num_experts)]
    experts = tuple(places.pop(name) for name in names)
    first = [blobs[expert_name(index, 0)] for index in range(len(layers))]
    return Manifest(
        source=origin.name,
        revision=origin.revision,
        codec=chosen.codec,
        dense_codec=chosen.dense_codec,
        scales=chosen.scales,
        importances=chosen.importances,
        adapter=chosen.adapter,
        layers=tuple(
            Layer(
                name=name,
                num_experts=layer.num_experts,
                record_bytes=blob.num_bytes,
                shape=layer.shape,
                codec=blob.codec,
            )
            for (name, layer), blob in zip(layers, first, strict=True)
        ),
        files=stored_files(files),
        experts=experts,
        dense=tuple(
            DenseEntry(
                name=name,
                dtype=blobs[name].dtype,
                shape=blobs[name].shape,
                place=place,
                quantized=blobs[name].quantized,
                codec=blobs[name].codec,
                is_lookup=blobs[name].is_lookup,
            )
            for name, place in places.items()
        ),
        metadata=describe_metadata(metadata),
    )
