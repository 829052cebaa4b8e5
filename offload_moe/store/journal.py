"""The progress of a conversion on disk: a first line of settings, then one line per finished blob."""

import json
import os
from pathlib import Path
from typing import Any

from offload_moe.errors import StoreError
from offload_moe.native.files import read_fully
from offload_moe.store import durable
from offload_moe.system.folders import delete_file, make_folder
from offload_moe.system.locks import no_locks, try_lock
from offload_moe.system.open_files import open_descriptor
from offload_moe.system.paths import MANIFEST_NAME

JOURNAL_NAME = "conversion.journal"
UPGRADE_LOCK = "upgrade.lock"  # a file, which stays where an upgrade was stopped
LINE_BYTES = 9  # CRC-32 in hexadecimal and a newline


class Journal:
    """Claims a folder for one conversion and records the checksums of finished blobs.

    An incomplete last line is ignored. After a power cut the journal may be ahead of the data, so a resumed conversion
    compares the data with it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Start or resume a conversion. Raises: StoreError when the folder belongs to something else."""
        self._path = folder / JOURNAL_NAME
        self.notice: str | None = None  # notices for the user about the claim
        first_line = json.dumps(settings, sort_keys=True).encode() + b"\n"
        check_target(folder)
        if not self._path.exists():
            make_folder(folder)
            durable.write_file(self._path, first_line)
        self._file = open_descriptor(self._path, os.O_RDWR)
        try:
            self._lock()
            content = bytearray(os.fstat(self._file).st_size)
            del content[read_fully(self._file, memoryview(content), 0) :]
            if not content.startswith(first_line):
                raise StoreError(_difference(folder, content, settings))
        except BaseException:
            os.close(self._file)
            raise
        self._start = len(first_line)
        self.checksums = _checksums(content[self._start :])

    def append(self, checksum: int) -> None:
        """Record a finished blob."""
        durable.write_at(self._file, b"%08x\n" % checksum, self._start + LINE_BYTES * len(self.checksums))
        self.checksums.append(checksum)

    def cut(self, count: int) -> None:
        """Drop all but the first `count` blobs."""
        del self.checksums[count:]
        os.ftruncate(self._file, self._start + LINE_BYTES * count)

    def sync(self) -> None:
        durable.sync(self._file)

    def remove(self) -> None:
        """Delete the journal of a finished conversion."""
        delete_file(self._path)

    def close(self) -> None:
        os.close(self._file)

    def _lock(self) -> None:
        state = try_lock(self._file)
        if state == "held elsewhere":
            raise StoreError(_is_being_written(self._path.parent))
        if state == "unavailable":
            self.notice = no_locks(self._path.parent)


def check_not_written(folder: Path) -> None:
    """Check that no other process converts into the folder, or upgrades it. Raises: StoreError."""
    if any(_is_locked(folder / name) for name in (JOURNAL_NAME, UPGRADE_LOCK)):
        raise StoreError(_is_being_written(folder))


def _is_being_written(folder: Path) -> str:
    return f"{folder} is being written by another process. Wait for it to end, or stop it."


def _is_locked(path: Path) -> bool:
    try:
        descriptor = open_descriptor(path)
    except FileNotFoundError:
        return False
    try:
        return try_lock(descriptor, is_shared=True) == "held elsewhere"
    finally:
        os.close(descriptor)


def _checksums(lines: bytearray) -> list[int]:
    found = []
    for start in range(0, len(lines) - LINE_BYTES + 1, LINE_BYTES):
        line = lines[start : start + LINE_BYTES]
        try:
            found.append(int(line[:8], 16) if line.endswith(b"\n") else -1)
        except ValueError:
            found.append(-1)
        if found[-1] < 0:
            return found[:-1]
    return found


def check_target(folder: Path) -> None:
    """Check that a conversion may begin or resume in this folder. Raises: StoreError.

    The folder must be new or empty, apart from the remains of a conversion's own first write.
    """
    if (folder / JOURNAL_NAME).exists() or not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file. Choose a new folder for the store.")
    names = {path.name for path in folder.iterdir()} - {JOURNAL_NAME + durable.PART}
    if MANIFEST_NAME in names:
        raise StoreError(f"{folder} is already a finished store. Use it, delete it, or choose another folder.")
    if names:
        raise StoreError(f"{folder} is not empty and not ours ({sorted(names)[0]}). Choose a new folder for the store.")


def _difference(folder: Path, content: bytearray, settings: dict[str, Any]) -> str:
    try:
        begun = json.loads(content.split(b"\n", 1)[0])
        different = sorted(key for key in {*begun, *settings} if begun.get(key) != settings.get(key))
    except (ValueError, TypeError, AttributeError):
        different = ["everything"]
    return (
        f"{folder} holds a conversion that was begun with another {', '.join(different)}. "
        "Repeat that command to resume it, or delete the folder."
    )
