"""Folders and the names in them: made, deleted and synced, also where Windows has another form for long paths."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from offload_moe.system import windows

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems that sync files alone


def make_folder(path: Path) -> None:
    """Make a folder and those that it lies in, where they are missing. Raises: OSError."""
    os.makedirs(windows.name_of(path), exist_ok=True)


def delete_file(path: Path) -> None:
    """Delete a file, if it is there. Raises: OSError."""
    with suppress(FileNotFoundError):
        os.unlink(windows.name_of(path))


def sync_folder(path: Path) -> None:
    """Sync the names in a folder; before the return, a power cut may undo a rename. Raises: OSError."""
    if windows.IS_WINDOWS:
        return  # folders cannot be opened there, nor need to be: NTFS keeps a journal of names
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
