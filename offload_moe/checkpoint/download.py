"""Shards of a hub repository, downloaded on demand and deleted after use.

For disks that cannot hold both a checkpoint and its store: all headers are fetched first, then one shard at a time.
Everything is in a separate folder, identified by a note in it; nothing else is ever deleted.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.header import MAX_HEADER_BYTES, HeaderCopy
from offload_moe.checkpoint.hub import PARTIAL, HubFile, Repository, fetch, fetch_beginning, open_repository
from offload_moe.checkpoint.weight_files import choose_weights, require, safe_path
from offload_moe.errors import BudgetError, CheckpointError, StoreError, TransferError
from offload_moe.system.folders import delete_file, make_folder
from offload_moe.system.locks import try_lock
from offload_moe.system.open_files import WRITING, open_descriptor, replace_file
from offload_moe.system.paths import names_in
from offload_moe.system.progress import Progress
from offload_moe.system.sizes import format_size

NOTE_NAME = "offload-moe-download.json"
HEADERS = "headers"
FIRST_BYTES = 1 << 17  # most headers are shorter, so that one request is enough


class Download:
    """A download folder for one commit of a repository. It is locked until `close`, or the end of the context."""

    def __init__(
        self, folder: Path, repo_id: str, *, revision: str | None, token: str | None, progress: Progress
    ) -> None:
        """Claim the folder. A new one resolves the revision on the hub, an existing one keeps its commit.

        Raises:
        StoreError: the folder is no download folder, is in use, or was begun for another source.
        TransferError: the hub refuses or cannot be reached.
        """
        self.folder = folder
        self._progress = progress
        self._lock = _claim(folder)
        try:
            note = _read_note(folder)
            if note:
                _check_is_of(folder, note, repo_id, revision)
            self.repository = (
                Repository(
                    repo_id=repo_id,
                    commit=note["commit"],
                    files={name: HubFile(**fields) for name, fields in note["files"].items()},
                    token=token,
                )
                if note
                else open_repository(repo_id, revision=revision, token=token)
            )
            if not note:
                _write_note(folder, self.repository, revision)
        except BaseException:
            self.close()
            raise

    @property
    def commit(self) -> str:
        return self.repository.commit

    @property
    def file_names(self) -> Collection[str]:
        return self.repository.files.keys()

    def fetch_metadata(self, names: Iterable[str]) -> None:
        """Download the small files of `names` that are missing.

        Raises: CheckpointError for a name that leads out of the folder, TransferError.
        """
        for name in names:
            path = safe_path(self.folder, name)
            if not path.exists():
                make_folder(path.parent)
                fetch(self.repository, name, path, lambda done: None)

    def fetch_headers(self) -> None:
        """Download the headers of all shards, so that the checkpoint can be opened without the shards.

        Raises: CheckpointError when the repository has no safetensors or lacks a shard, TransferError.
        """
        weights = choose_weights(self.folder, self.repository.files)
        require(self.folder, weights, self.repository.files)
        for path in (self.folder / name for name in weights.names):
            if path.parent != self.folder:
                raise CheckpointError(f"{path} is in a folder of its own. Convert it without --delete-source-shards.")
            copy = self._header_path(path.name)
            if not copy.exists():
                self._progress(f"Downloading headers, {path.name}")
                make_folder(copy.parent)
                data = self._beginning(path)
                partial = copy.with_name(copy.name + PARTIAL)
                partial.write_bytes(data)
                replace_file(partial, copy)

    def header_of(self, path: Path) -> HeaderCopy:
        """The header of a missing shard, for `read_header`."""
        return HeaderCopy(path=self._header_path(path.name), file_bytes=self.repository.files[path.name].num_bytes)

    def provide(self, path: Path) -> None:
        """Download a shard if it is missing. Raises: BudgetError when the disk is too small, TransferError."""
        if path.exists():
            return
        name, size = path.name, self.repository.files[path.name].num_bytes
        partial = path.with_name(path.name + PARTIAL)
        needed = size - (partial.stat().st_size if partial.exists() else 0)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise BudgetError(
                f"Shard {name} needs {format_size(needed)} more on the disk of {self.folder}, {format_size(free)} is "
                f"free. Free {format_size(needed - free)} and run the same command again to resume."
            )
        phase = f"Downloading {name}"
        self._progress(phase, size - needed, size)
        fetch(self.repository, name, path, lambda done: self._progress(phase, done, size))

    def discard(self, path: Path) -> None:
        """Delete a shard; a later read would download it again."""
        assert path.parent == self.folder, "only what was downloaded here is deleted"
        delete_file(path)

    def remove(self) -> None:
        """Delete the folder of a finished conversion, except for foreign files."""
        _remove(self.folder, self.repository.files)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _header_path(self, name: str) -> Path:
        return self.folder / HEADERS / name

    def _beginning(self, path: Path) -> bytes:
        """A shard's header, preceded by its length."""
        if path.exists():
            with path.open("rb") as stream:
                length = stream.read(8)
                return length + stream.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
        data = fetch_beginning(self.repository, path.name, FIRST_BYTES)
        needed = 8 + int.from_bytes(data[:8], "little")
        if needed > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path.name} of {self.repository.repo_id} is not a safetensors file.")
        return data[:needed] if needed <= len(data) else fetch_beginning(self.repository, path.name, needed)


def is_download(folder: Path) -> bool:
    """Whether the folder is one of a download, or what a kill at its end left of it."""
    names = names_in(folder)
    return names is not None and (NOTE_NAME in names or not names)


def remove_download(folder: Path) -> None:
    """Delete the folder of an unfinished download, except for foreign files. Raises: StoreError, TransferError."""
    lock = _claim(folder)
    try:
        note = _read_note(folder)
        _remove(folder, note["files"] if note else ())
    except OSError as error:
        raise TransferError(f"{error.filename or folder} cannot be deleted: {error.strerror}.") from error
    finally:
        os.close(lock)


def _remove(folder: Path, names: Collection[str]) -> None:
    """Delete these files, the headers, and the note last, because it identifies the folder after a kill."""
    ours = {*names, *(name + PARTIAL for name in names)} - {NOTE_NAME}
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after its content
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty
                path.rmdir()
        elif path.parent == folder / HEADERS or path.relative_to(folder).as_posix() in ours:
            delete_file(path)
    delete_file(folder / NOTE_NAME)
    with suppress(OSError):
        folder.rmdir()


def _claim(folder: Path) -> int:
    """Lock a new, empty or earlier download folder. Raises: StoreError."""
    if folder.exists() and not (folder / NOTE_NAME).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is there already and is no download of ours. Move it, or name another store.")
    try:
        make_folder(folder)
        lock = open_descriptor(folder / NOTE_NAME, WRITING)
    except OSError as error:
        raise TransferError(f"{folder} cannot be written: {error.strerror}.") from error
    if try_lock(lock) == "held elsewhere":
        os.close(lock)
        raise StoreError(f"{folder} is in use by another process. Wait for it to end.")
    return lock


def _read_note(folder: Path) -> dict[str, Any] | None:
    """The note of an earlier download; None for a new one. Raises: StoreError."""
    text = (folder / NOTE_NAME).read_bytes()
    if not text:
        return None
    try:
        note: dict[str, Any] = json.loads(text)
        complete = {"repo_id", "revision"} <= note.keys() and isinstance(note["commit"], str)
        complete = complete and isinstance(note["files"], dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete and [path.name for path in folder.iterdir()] == [NOTE_NAME]:
        return None  # an incomplete write
    if not complete:
        raise StoreError(f"{folder / NOTE_NAME} is damaged. Delete that folder and start again.")
    return note


def _check_is_of(folder: Path, note: dict[str, Any], repo_id: str, revision: str | None) -> None:
    """Check that the download is of that revision, by the name that it was begun with or by its commit.

    Raises: StoreError.
    """
    if note["repo_id"] != repo_id or revision not in (note["revision"], note["commit"]):
        raise StoreError(
            f"{folder} holds a download of {note['repo_id']} at {note['revision'] or 'its newest revision'}. "
            "Repeat that command to resume it, or delete the folder."
        )


def _write_note(folder: Path, repository: Repository, revision: str | None) -> None:
    """Write the note in place, since it is locked, before any other file, so that an incomplete note is alone."""
    note = {
        "repo_id": repository.repo_id,
        "revision": revision,
        "commit": repository.commit,
        "files": {name: asdict(file) for name, file in repository.files.items()},
    }
    with (folder / NOTE_NAME).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(note, indent=1))
        stream.flush()
        os.fsync(stream.fileno())
