"""Durable writes: after a kill or a power cut a file has either its old content or its new one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload_moe.errors import BudgetError, TransferError
from offload_moe.system.folders import delete_file, sync_folder
from offload_moe.system.full_disk import is_full
from offload_moe.system.open_files import WRITING, open_descriptor, replace_file

PART = ".part"  # suffix of unfinished files
ELSEWHERE = " Choose a folder that you can write; OFFLOAD_MOE_CACHE names another one for models."
REMEDIES = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), ELSEWHERE) | {
    errno.EFBIG: " The file system, or `ulimit -f`, allows no larger file. What is converted is kept: raise the limit, "
    "or choose another disk, and run the same command again to resume."
}


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`, in as many writes as necessary."""
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, view, offset)
        else:  # Windows
            os.lseek(descriptor, offset, os.SEEK_SET)
            count = os.write(descriptor, view)
        view, offset = view[count:], offset + count


def sync(descriptor: int) -> None:
    """Sync a file; before the return, a power cut may undo writes."""
    os.fsync(descriptor)


def publish(part: Path, final: Path) -> None:
    """Rename a finished and synced file to its final name."""
    replace_file(part, final)
    sync_folder(final.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    part = path.with_name(path.name + PART)
    descriptor = open_descriptor(part, WRITING | os.O_TRUNC)
    try:
        write_at(descriptor, data, 0)
        sync(descriptor)
    finally:
        os.close(descriptor)
    publish(part, path)


def remove(path: Path) -> None:
    """Delete a file, if it is there."""
    delete_file(path)
    sync_folder(path.parent)


@contextmanager
def named_errors(folder: Path) -> Iterator[None]:
    """Translate errors of writing. Raises: BudgetError for a full disk, TransferError for any other OSError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise BudgetError(
                f"The disk of {folder} is full. What is converted is kept: free some space and run the same command "
                "again to resume."
            ) from error
        remedy = REMEDIES.get(error.errno or 0, "")
        raise TransferError(f"Writing to {folder} failed: {error.strerror}.{remedy}") from error
