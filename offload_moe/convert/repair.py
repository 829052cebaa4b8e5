"""Finding damaged pieces of a store, and making them again from its checkpoint."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.gguf_split import is_gguf
from offload_moe.checkpoint.source import metadata_files, resolve_source
from offload_moe.convert.gguf import plan_same_bits
from offload_moe.convert.gguf_source import local_gguf, small_files_of
from offload_moe.convert.jobs import Job, plan_conversion
from offload_moe.errors import ConfigError, StoreError
from offload_moe.native.kernels import crc32
from offload_moe.quant import get_codec
from offload_moe.store import Piece, Store, durable
from offload_moe.store.in_place import GGUF
from offload_moe.store.manifest_json import read_manifest
from offload_moe.store.plan import Blob, header_of
from offload_moe.store.reading import forget_cached
from offload_moe.store.writer import Payload
from offload_moe.system.folders import make_folder
from offload_moe.system.names import names_hub, split_gguf_name
from offload_moe.system.open_files import WRITING, open_descriptor
from offload_moe.system.paths import user_path
from offload_moe.system.progress import Progress, silent

NUM_READERS = 4  # a fast disk reads more than one thread can check

_Payload = Callable[[], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A damaged piece of the store, and the error of reading it."""

    piece: Piece
    error: StoreError


def find_damage(store: Store, progress: Progress = silent) -> list[Damage]:
    """Read everything from the disk and compare it with its checksum; several reads are in flight."""
    pieces = list(store.pieces())
    for path in {piece.path for piece in pieces}:
        forget_cached(path)  # the check is of the disk's content
    total, done = sum(piece.place.num_bytes for piece in pieces), 0
    found = []
    pool = ThreadPoolExecutor(NUM_READERS, "verify")
    try:
        for piece, error in zip(pieces, pool.map(_error_of, pieces), strict=True):
            done += piece.place.num_bytes
            progress("Verifying", done, total)
            if error is not None:
                found.append(Damage(piece=piece, error=error))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def restore_sizes(folder: Path) -> None:
    """Extend missing or truncated files to their length, so that the store opens and can be repaired.

    Raises: StoreError when the manifest itself cannot be read, TransferError or BudgetError when writing fails.
    """
    manifest = read_manifest(folder)
    for file in (*manifest.files, *manifest.metadata):
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            with durable.named_errors(folder):
                make_folder(path.parent)
                descriptor = open_descriptor(path, WRITING)
                try:
                    os.ftruncate(descriptor, file.num_bytes)
                finally:
                    os.close(descriptor)


def repair(
    store: Store,
    damages: Sequence[Damage],
    source: str | Path | None = None,
    *,
    token: str | None = None,
    follow_links: bool = False,
    progress: Progress = silent,
) -> list[Damage]:
    """Make damaged pieces again from the checkpoint; returns the failed ones, which are left unchanged.

    A piece is written only when its new bytes have the checksum on record.

    source: checkpoint folder, GGUF file or hub id; None takes the hub id and revision in the manifest, or the GGUF
        file that it names.
    follow_links: see `quantize`.

    Raises:
        ConfigError: the store has no source.
        CheckpointError, TransferError: the source cannot be read.
        TransferError, BudgetError: writing failed.
    """
    name, revision = _origin(store, source)
    gguf, commit = local_gguf(name, revision=revision, token=token, keeps_bits=store.codec == GGUF, progress=progress)
    remaining = []
    total, done = sum(damage.piece.place.num_bytes for damage in damages), 0
    with ExitStack() as stack:
        if gguf:
            origin = small_files_of(gguf, str(name), commit, stack)
        else:
            merged = None if store.adapter is None else user_path(name)  # which may lie beside the weights
            origin = resolve_source(name, revision=revision, token=token, follow_links=follow_links, adapter=merged)
        checkpoint = stack.enter_context(Checkpoint(origin.folder, gguf=gguf))
        payloads = dict(_payloads(store, checkpoint))
        for damage in damages:
            place = damage.piece.place
            payload = payloads.get((damage.piece.path, place.offset, place.num_bytes))
            data = b"" if payload is None else payload()
            if len(data) == place.num_bytes and crc32(data) == place.checksum:
                _write(damage.piece, data)
            else:
                remaining.append(damage)
            done += place.num_bytes
            progress("Repairing", done, total)
    return remaining


def _origin(store: Store, source: str | Path | None) -> tuple[str | Path, str | None]:
    if source is not None:
        return source, store.revision if source == store.source else None
    if not has_known_source(store):
        kind = "file" if store.source.endswith(".gguf") else "folder"
        raise ConfigError(
            f"{store.path} was made from a {kind} named {store.source}, which is not there. Name it with --source."
        )
    return store.source, store.revision


def has_known_source(store: Store) -> bool:
    """Whether the checkpoint is found by its name in the manifest: on the hub, or a GGUF file that is still there."""
    source = store.source
    if source.endswith(".gguf") and split_gguf_name(source) is None:  # else `folder/file.gguf` would be a hub id
        return is_gguf(user_path(source))
    return names_hub(source) or is_gguf(user_path(source))


def _jobs(store: Store, checkpoint: Checkpoint) -> list[Job]:
    """Raises: ConfigError where the store has the bits of a GGUF file, and the source is none."""
    if store.codec != GGUF:
        codecs = get_codec(store.codec), get_codec(store.dense_codec)
        return plan_conversion(checkpoint, *codecs, scales=store.scales, order_of=store.order_of)[1]
    if checkpoint.gguf is None:
        raise ConfigError(
            f"{store.path} has the bits of a GGUF file, named {store.source}. Name that file with --source."
        )
    return plan_same_bits(checkpoint)[1]


def _payloads(store: Store, checkpoint: Checkpoint) -> Iterator[tuple[tuple[Path, int, int], _Payload]]:
    """(file, offset, length) of every piece that this checkpoint can make, with its job."""
    blobs: dict[Path, list[tuple[int, Blob]]] = {}
    for job in _jobs(store, checkpoint):
        if (found := store.place_of(job.blob.name)) is not None:
            path, offset, num_bytes = found
            blobs.setdefault(path, []).append((offset, job.blob))
            yield (path, offset, num_bytes), partial(_join, job.make)
    for path, inside in blobs.items():
        header = header_of([blob for _, blob in sorted(inside, key=lambda pair: pair[0])])
        yield (path, 0, len(header)), partial(bytes, header)
    for name, path in metadata_files(checkpoint.folder).items():
        yield (store.path / name, 0, path.stat().st_size), path.read_bytes


def _join(make: Callable[[], Payload]) -> bytes:
    return b"".join(make())


def _error_of(piece: Piece) -> StoreError | None:
    try:
        piece.check()
    except StoreError as error:
        return error
    return None


def _write(piece: Piece, data: bytes) -> None:
    """Write in place, since the overwritten bytes are damaged already."""
    with durable.named_errors(piece.path.parent):
        descriptor = open_descriptor(piece.path, os.O_RDWR)
        try:
            durable.write_at(descriptor, data, piece.place.offset)
            durable.sync(descriptor)
        finally:
            os.close(descriptor)
