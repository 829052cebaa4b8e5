"""Open files, whose number is limited per process: 256 on macOS by default."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WANTED = 4096
READING = os.O_RDONLY | getattr(os, "O_BINARY", 0)


def open_descriptor(path: Path, flags: int = READING) -> int:
    """`os.open`, which raises the limit of open files, if permitted, when the limit is reached.

    Raises: OSError; for too many open files, with a remedy.
    """
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        if raise_limit():
            return os.open(path, flags)
        raise OSError(error.errno, _advice(), str(path)) from error


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


def _advice() -> str:
    return f"too many open files; allow more, such as with `ulimit -n {WANTED}`, and run the same command again"
