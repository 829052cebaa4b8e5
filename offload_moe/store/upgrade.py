"""From rows to panels: a store of an older version rewritten file by file.

At every moment the manifest lists complete files, so a store can be loaded, and upgraded further, after a kill or a
power cut. A file in panels has a name of its own: readers that have opened the one in rows read on in that.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from offload_moe.errors import BudgetError, StoreCorrupt, StoreError
from offload_moe.native.kernels import crc32
from offload_moe.store import durable
from offload_moe.store.journal import JOURNAL_NAME, UPGRADE_LOCK, check_not_written
from offload_moe.store.manifest import DataFile, DenseEntry, Manifest, Place
from offload_moe.store.manifest_json import manifest_to_json
from offload_moe.store.reading import read_checked
from offload_moe.store.store import Piece, Store
from offload_moe.system.folders import delete_file
from offload_moe.system.locks import lock_file, no_locks
from offload_moe.system.open_files import WRITING, open_descriptor
from offload_moe.system.paths import MANIFEST_NAME
from offload_moe.system.progress import Progress, log_notice, silent
from offload_moe.system.sizes import format_size

IN_PANELS = "-panels"  # in the name of a file that was in rows


def upgrade(folder: Path, progress: Progress = silent, on_notice: Callable[[str], None] = log_notice) -> int:
    """Rewrite the data files whose records could be in panels. Returns the number of files rewritten.

    Every byte is compared with its checksum first. Needs room for one more file on the disk, and memory for its largest
    tensor. An upgrade that was stopped, by whatever means, is continued by the same call.

    Raises:
        StoreError: links lead to the store or out of it, it is read-only, or another process is writing it.
        StoreCorrupt: a piece does not match its checksum.
        BudgetError: the disk is too small, or became full.
        TransferError: writing failed.
    """
    store = Store.open(folder)
    if not store.files_in_rows() and not (folder / UPGRADE_LOCK).exists():
        return 0
    _check_own(store)
    with _claimed(folder, on_notice):
        store = Store.open(folder)
        _remove_leftovers(store)
        files = store.files_in_rows()
        _check_space(folder, files)
        done, total = 0, sum(file.num_bytes for file in files)
        progress("Upgrading", done, total)
        for file in files:
            for num_bytes in _rewrite(store, file):
                done += num_bytes
                progress("Upgrading", done, total)
            store = Store.open(folder)
    return len(files)


def _check_own(store: Store) -> None:
    """Check that the store's files are its own and can be replaced. Raises: StoreError."""
    folder = store.path
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link to {folder.resolve()}. Upgrade the store by that path.")
    files = [folder / MANIFEST_NAME, *(folder / file.name for file in store.manifest.files)]
    for path in files:
        num_names = path.stat().st_nlink
        if path.is_symlink() or num_names > 1:
            why = f"is a link to {path.resolve()}" if path.is_symlink() else f"has {num_names} names (hard links)"
            raise StoreError(
                f"{path} {why}, so other folders share it. Copy the store to a folder of its own, with copies in place "
                "of links, and upgrade that."
            )
    for path in (folder, *files):
        if not path.stat().st_mode & stat.S_IWUSR or not os.access(path, os.W_OK):
            raise StoreError(f"{path} is read-only. Make the store writable, or upgrade a copy of it.")


def _remove_leftovers(store: Store) -> None:
    """Delete the files of a stopped upgrade that the manifest does not list: those replaced, and those not finished."""
    for file in store.manifest.files:
        for ending in ("", durable.PART):
            durable.remove(store.path / (_other_name(file.name) + ending))


@contextmanager
def _claimed(folder: Path, on_notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the store's lock; its file stays where the body fails."""
    check_not_written(folder)
    lock = folder / UPGRADE_LOCK
    with durable.named_errors(folder), lock_file(lock) as state:
        if state == "held elsewhere":
            raise StoreError(f"{folder} is being upgraded by another process. Wait for it to end.")
        if state == "unavailable":
            on_notice(no_locks(folder))
        # The manifest is written last, so this conversion has ended, and must not be resumed in another version.
        durable.remove(folder / JOURNAL_NAME)
        yield
        durable.remove(lock)


def _rewrite(store: Store, file: DataFile) -> Iterator[int]:
    """Write one file in panels, and list it in place of the one in rows. Yields the bytes of each piece."""
    final = store.path / _other_name(file.name)
    part = final.with_name(final.name + durable.PART)
    mode = stat.S_IMODE((store.path / file.name).stat().st_mode)
    descriptor = open_descriptor(part, WRITING | os.O_TRUNC, mode)
    checksums: dict[Place, int] = {}
    try:
        for piece in _pieces(store, file):
            data = _read(piece)
            if piece.panels is not None:
                piece.panels.to_panels(data)
            view = data.numpy().data
            durable.write_at(descriptor, view, piece.place.offset)
            checksums[piece.place] = crc32(view, 0)
            yield piece.place.num_bytes
        durable.sync(descriptor)
    except BaseException:
        with suppress(OSError):
            delete_file(part)
        raise
    finally:
        os.close(descriptor)
    durable.publish(part, final)
    manifest = _with_file(store.manifest, file, replace(file, name=final.name, order="panels"), checksums)
    durable.write_file(store.path / MANIFEST_NAME, manifest_to_json(manifest).encode())
    durable.remove(store.path / file.name)


def _read(piece: Piece) -> Tensor:
    try:
        return read_checked(piece.path, piece.place, piece.name)
    except StoreCorrupt as error:
        raise StoreCorrupt(f"{error} `offload-moe verify --repair` may repair it; then upgrade again.") from error


def _pieces(store: Store, file: DataFile) -> list[Piece]:
    """The pieces of one file by offset. Raises: StoreCorrupt unless they are the whole file."""
    path = store.path / file.name
    found = (piece for piece in store.pieces() if piece.path == path)
    pieces = sorted(found, key=lambda piece: (piece.place.offset, piece.place.num_bytes))
    end = 0
    for piece in pieces:
        if piece.place.offset != end:
            break
        end += piece.place.num_bytes
    if end != file.num_bytes:
        raise StoreCorrupt(
            f"{path}: the manifest lists bytes up to {end} of {file.num_bytes}. Quantize the model again."
        )
    return pieces


def _with_file(manifest: Manifest, old: DataFile, new: DataFile, checksums: dict[Place, int]) -> Manifest:
    def place(found: Place) -> Place:
        return replace(found, checksum=checksums.get(found, found.checksum))

    def entry(found: DenseEntry) -> DenseEntry:
        return replace(found, place=place(found.place))

    return replace(
        manifest,
        files=tuple(new if file == old else file for file in manifest.files),
        experts=tuple(map(place, manifest.experts)),
        dense=tuple(map(entry, manifest.dense)),
    )


def _other_name(name: str) -> str:
    """`experts-00001.safetensors` -> `experts-00001-panels.safetensors`, and back."""
    stem, ending = name.removesuffix(".safetensors"), ".safetensors"
    return (stem.removesuffix(IN_PANELS) if stem.endswith(IN_PANELS) else stem + IN_PANELS) + ending


def _check_space(folder: Path, files: list[DataFile]) -> None:
    needed = max((file.num_bytes for file in files), default=0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BudgetError(
            f"An upgrade needs room for one more file, {format_size(needed)}, on the disk of {folder}; "
            f"{format_size(free)} is free. Free {format_size(needed - free)}."
        )
