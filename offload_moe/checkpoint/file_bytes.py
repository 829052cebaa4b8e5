"""Bytes of a weight file, by plain positioned reads."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from offload_moe.errors import CheckpointError, TransferError
from offload_moe.native.files import read_fully
from offload_moe.system.open_files import opened


def read_bytes(
    path: Path,
    offset: int,
    target: Tensor,
    what: str,
    reading: Callable[[Path], AbstractContextManager[int]] = opened,
) -> None:
    """Fill a contiguous uint8 tensor from there on. reading: gives the file's descriptor.

    Raises: CheckpointError, TransferError naming the file and `what`.
    """
    view = target.numpy().data
    try:
        with reading(path) as descriptor:
            count = read_fully(descriptor, view, offset)
    except OSError as error:
        raise TransferError(f"{path}: reading {what} failed: {error.strerror}.") from error
    if count < len(view):
        raise CheckpointError(f"{path} is truncated inside {what}: {offset + len(view)} bytes needed.")
