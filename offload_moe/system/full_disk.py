"""A full disk: what has no room, how much it needs and how much was free."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload_moe.errors import BudgetError
from offload_moe.system.sizes import format_size

FULL = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = "Free some space, or name a folder on another disk with OFFLOAD_MOE_CACHE, and run the same command again."


def is_full(error: OSError) -> bool:
    """Whether it is of a full disk, or of a quota that is used up."""
    return error.errno in FULL


@contextmanager
def full_disk_named(folder: Path, num_bytes: int, advice: str) -> Iterator[None]:
    """Translate a full disk's error. num_bytes: written inside, into a folder that exists.

    Raises: BudgetError.
    """
    free = shutil.disk_usage(folder).free
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise BudgetError(
            f"The disk of {folder} is full: {format_size(num_bytes)} are needed, {format_size(free)} were free. "
            + advice
        ) from error
