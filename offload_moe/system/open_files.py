"""Open files, whose number is limited per process: 256 on macOS by default."""

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload_moe.system import windows

WANTED = 4096
IN_THE_WAY_S, RETRY_S = 3.0, 0.05
IN_USE = "another process has the file open: end it, then run the same command again"
WRITING = os.O_RDWR | os.O_CREAT


def open_descriptor(path: Path, flags: int = os.O_RDONLY, mode: int = 0o644, *, is_direct: bool = False) -> int:
    """`os.open` in binary mode, which raises the limit of open files, if permitted, when the limit is reached.

    On Windows others may replace or delete the file meanwhile.
    is_direct: reads go around the page cache, in whole pages.

    Raises: OSError; for too many open files, with a remedy.
    """
    try:
        return _open(path, flags, mode, is_direct)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        if raise_limit():
            return _open(path, flags, mode, is_direct)
        raise OSError(error.errno, _advice(), str(path)) from error


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a file that is open inside, to be read. Raises: OSError."""
    descriptor = open_descriptor(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class OpenFiles:
    """Files that are read repeatedly, of which a few stay open. Safe for several threads."""

    def __init__(self, num_kept: int = 16) -> None:
        self._num_kept = num_kept
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[Path, int] = OrderedDict()  # in order of last use
        self._num_uses: dict[int, int] = {}

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        """The file's descriptor, which stays open inside. Raises: OSError."""
        with self._lock:
            descriptor = self._descriptors.pop(path, None)
            if descriptor is None:
                self._close_beyond(self._num_kept - 1)
                descriptor = open_descriptor(path)
            self._descriptors[path] = descriptor
            self._num_uses[descriptor] = self._num_uses.get(descriptor, 0) + 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._num_uses[descriptor] -= 1
                self._close_beyond(self._num_kept)

    def release(self, path: Path) -> None:
        """Close a file without readers, so that deleting it frees the disk."""
        with self._lock:
            if path in self._descriptors:
                self._close(path)

    def close(self) -> None:
        with self._lock:
            for path in list(self._descriptors):
                self._close(path)

    def _close_beyond(self, num_kept: int) -> None:
        idle = [path for path, descriptor in self._descriptors.items() if not self._num_uses[descriptor]]
        for path in idle[: max(0, len(self._descriptors) - num_kept)]:
            self._close(path)

    def _close(self, path: Path) -> None:
        descriptor = self._descriptors.pop(path)
        self._num_uses.pop(descriptor, None)
        os.close(descriptor)


def replace_file(part: Path | str, final: Path) -> None:
    """`os.replace`. On Windows a file that is open, such as in a virus scanner, is in the way for a moment, or longer.

    Raises: OSError, there with the remedy.
    """
    deadline = time.monotonic() + IN_THE_WAY_S
    while True:
        try:
            os.replace(windows.name_of(part), windows.name_of(final))
        except PermissionError as error:
            if not windows.IS_WINDOWS:
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, IN_USE, str(final)) from error
            time.sleep(RETRY_S)
        else:
            return


def raise_limit() -> bool:
    """Whether more files may be open now."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return False
    return True


def _open(path: Path, flags: int, mode: int, is_direct: bool) -> int:
    if windows.IS_WINDOWS:
        return windows.open_file(path, flags, is_direct=is_direct)
    if is_direct:
        flags |= os.O_DIRECT
    return os.open(path, flags, mode)


def _advice() -> str:
    return f"too many open files; allow more, such as with `ulimit -n {WANTED}`, and run the same command again"
