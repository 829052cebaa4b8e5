"""Locks between processes, on file systems that have them: the system releases them when a process is killed.

Some have none (Lustre mounted without flock, CIFS, NFS without its lock service). On these, work continues unlocked.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from offload_moe.system import windows
from offload_moe.system.open_files import WRITING, open_descriptor

HELD_ERRORS = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # errors with no other meaning here
POLL_S = 0.1

State = Literal["locked", "held elsewhere", "unavailable"]


def try_lock(descriptor: int, *, is_shared: bool = False) -> State:
    """Try to lock an open file until it is closed, without waiting."""
    try:
        if windows.IS_WINDOWS:
            return "locked" if windows.try_lock(descriptor, is_shared=is_shared) else "held elsewhere"
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return "held elsewhere" if error.errno in HELD_ERRORS and not windows.IS_WINDOWS else "unavailable"
    return "locked"


def no_locks(folder: Path) -> str:
    """The notice for a file system without locks."""
    return f"The file system of {folder} has no file locks. Do not let another process write to that folder meanwhile."


@contextmanager
def lock_file(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[State]:
    """Try to lock a file, which is created if it is missing.

    on_wait: called once if another process holds the lock, which is then waited for.
    """
    descriptor = open_descriptor(path, WRITING)
    try:
        state = try_lock(descriptor)
        if state == "held elsewhere" and on_wait is not None:
            on_wait()
            while (state := try_lock(descriptor)) == "held elsewhere":
                time.sleep(POLL_S)
        yield state
    finally:
        os.close(descriptor)
