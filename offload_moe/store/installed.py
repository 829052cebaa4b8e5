"""The entries of the cache folder: expert stores, demo builds and unfinished conversions."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload_moe.checkpoint.source import METADATA_PATTERNS
from offload_moe.demo import checkpoint_folder
from offload_moe.demo.source import HUB_REPOSITORY, MODEL_NAME
from offload_moe.errors import OffloadMoeError, StoreError, StoreVersion
from offload_moe.store import Store, is_store
from offload_moe.store.beside import folders_beside, remove_beside
from offload_moe.store.durable import PART
from offload_moe.store.journal import JOURNAL_NAME, UPGRADE_LOCK, check_not_written
from offload_moe.store.manifest import DATA_FILE
from offload_moe.store.manifest_json import read_manifest
from offload_moe.store.resume import begun_with, resume_advice
from offload_moe.system.folders import delete_file
from offload_moe.system.locks import lock_file
from offload_moe.system.names import DEMO, DEMOS, STORES, check_installed, resolve
from offload_moe.system.paths import MANIFEST_NAME, cache_dir, file_advice

POPULARITY_NAME = "popularity.json"  # counts of each expert's use, kept beside a store

DEMO_IS_NOT_BUILT = "The demo model is not built yet. `offload-moe chat` builds it, from a 93 MB download."
Kind = Literal["store", "demo", "conversion", "damaged store", "store of a later version", "unfinished demo"]

_UNFINISHED_DEMO = re.compile(rf"\.({re.escape(MODEL_NAME)}-MoE-[0-9a-f]{{8}})\.partial")
_DEMO = re.compile(rf"{re.escape(MODEL_NAME)}-MoE-[0-9a-f]{{8}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """One folder. Unknown fields are None; `problem` is the reason why a store cannot be used."""

    name: str
    path: Path
    kind: Kind
    num_bytes: int
    codec: str | None = None
    dense_codec: str | None = None
    source: str | None = None
    revision: str | None = None
    problem: str | None = None


def installed(cache: Path | None = None) -> list[Installed]:
    """All entries of the cache folder, by name. Links are not followed."""
    root = cache_dir() if cache is None else cache
    found = (describe(path) for folder in (STORES, DEMOS) for path in _folders(root / folder))
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.name)


def describe(path: Path) -> Installed | None:
    """The entry of a folder; None for a foreign folder."""
    if is_store(path):
        return _describe_store(path)
    if (path / JOURNAL_NAME).is_file():
        return _describe_conversion(path)
    in_demos = path.parent.name == DEMOS
    if in_demos and _DEMO.fullmatch(path.name):
        return Installed(name=path.name, path=path, kind="demo", num_bytes=folder_bytes(path), source=HUB_REPOSITORY)
    if in_demos and _UNFINISHED_DEMO.fullmatch(path.name):
        return Installed(name=path.name, path=path, kind="unfinished demo", num_bytes=folder_bytes(path))
    return None


def resolve_installed(name: str | Path, cache: Path | None = None) -> Path:
    """As `resolve`; the demo resolves to its store, or to its checkpoint if there is no store yet.

    Raises: StoreError when the name could mean several.
    """
    path = resolve(name, cache)
    if name != DEMO or path.exists():
        return path
    root = cache_dir() if cache is None else cache
    built = checkpoint_folder(root)
    try:
        store = resolve(f"{built.name}-", root)
    except StoreError as error:
        raise StoreError(f"The demo has several stores. {error}") from None
    return store if store.exists() else built


def check_finished(path: Path) -> None:
    """Check that the folder has no unfinished conversion. Raises: StoreError."""
    if (path / JOURNAL_NAME).is_file() and not is_store(path):
        raise StoreError(f"{path} is an unfinished conversion. {resume_advice(path)}")


def find(name: str | Path, cache: Path | None = None) -> Installed:
    """The store, demo build or conversion of that name or path. Raises: StoreError."""
    check_installed(name)
    path = resolve_installed(name, cache)
    if not path.exists():
        raise StoreError(f"{DEMO_IS_NOT_BUILT}")
    if path.is_file():
        raise StoreError(file_advice(path))
    found = describe(path) if path.is_dir() else None
    if found is None:
        raise StoreError(f"{name} is neither a store nor a conversion. `offload-moe list` shows what is installed.")
    return found


def remove(entry: Installed) -> None:
    """Delete an entry and what its conversion keeps beside it, but neither foreign files nor targets of links.

    If a deletion is killed, the same call deletes the rest.

    Raises: StoreError when the folder is a link, is in use, or holds foreign files.
    """
    path = entry.path.absolute()  # also for "." inside the folder
    if path.is_symlink():
        raise StoreError(f"{path} is a link to another folder. Delete the link by hand.")
    if entry.kind in ("demo", "unfinished demo"):
        _remove_demo(path)
        return
    check_not_written(path)
    if foreign := sorted(_foreign(path)):
        raise StoreError(
            f"{path} holds {foreign[0]}, which no conversion writes ({len(foreign)} such entries). Move it and retry."
        )
    remove_beside(path)
    last = {MANIFEST_NAME, JOURNAL_NAME}  # deleted last, because they identify the folder
    for child in sorted(path.iterdir(), key=lambda child: child.name in last):
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            delete_file(child)
    path.rmdir()


def fingerprint(store: Path) -> str:
    """A digest of all checksums of a store: equal for stores with equal content, source and codecs."""
    return hashlib.sha256((store / MANIFEST_NAME).read_bytes()).hexdigest()[:16]


def folder_bytes(path: Path) -> int:
    """Bytes of all files in a folder, without links and without files that disappear during the count."""
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                stat = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            total += stat.st_size
    return total


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _describe_store(path: Path) -> Installed:
    try:
        store = Store.open(path)
    except OffloadMoeError as error:
        kind: Kind = "store of a later version" if isinstance(error, StoreVersion) else "damaged store"
        return Installed(name=path.name, path=path, kind=kind, num_bytes=folder_bytes(path), problem=str(error))
    return Installed(
        name=path.resolve().name,
        path=path,
        kind="store",
        num_bytes=folder_bytes(path),
        codec=store.codec,
        dense_codec=store.dense_codec,
        source=store.source,
        revision=store.revision,
    )


def _describe_conversion(path: Path) -> Installed:
    begun = begun_with(path)
    keys = {"source": "source", "revision": "revision", "codec": "codec", "dense codec": "dense_codec"}
    texts = {field: begun[key] for key, field in keys.items() if isinstance(begun.get(key), str)}
    return Installed(
        name=path.resolve().name,
        path=path,
        kind="conversion",
        num_bytes=sum(map(folder_bytes, (path, *folders_beside(path)))),
        problem=None if keys.keys() <= begun.keys() else "its journal cannot be read",
        **texts,
    )


def _foreign(path: Path) -> set[str]:
    """Entries of a store or conversion that no conversion writes."""
    written = _small_files(path)
    found = set()
    for parent, folders, names in os.walk(path):
        for name in (*names, *(folder for folder in folders if Path(parent, folder).is_symlink())):
            inside = str(Path(parent, name).relative_to(path))
            if not _is_ours(inside.removesuffix(PART), written):
                found.add(inside)
    return found


def _small_files(path: Path) -> set[str] | None:
    """Names of the small files of a finished store; None if the manifest has none."""
    try:
        return {file.name for file in read_manifest(path).metadata}
    except OffloadMoeError:
        return None


def _is_ours(name: str, small_files: set[str] | None) -> bool:
    if name in (MANIFEST_NAME, JOURNAL_NAME, UPGRADE_LOCK, POPULARITY_NAME) or DATA_FILE.fullmatch(name):
        return True
    if small_files is not None:
        return name in small_files
    depth = name.count("/")
    return any(Path(name).match(pattern) and pattern.count("/") == depth for pattern in METADATA_PATTERNS)


def _remove_demo(path: Path) -> None:
    unfinished = _UNFINISHED_DEMO.fullmatch(path.name)
    final = path.with_name(unfinished[1]) if unfinished else path
    with lock_file(final.with_name(f"{final.name}.lock")) as state:
        if state == "held elsewhere":
            raise StoreError(f"{path} is being built by another process. Stop it first.")
        shutil.rmtree(path)
