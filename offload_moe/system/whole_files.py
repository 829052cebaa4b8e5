"""Files that are written whole or not at all."""

import os
import shutil
from pathlib import Path

from offload_moe.system.folders import delete_file
from offload_moe.system.open_files import WRITING, open_descriptor, replace_file


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file whole or not at all: on a full disk an old one stays. A link stays one, and a mode what it is.

    mode: of a new file, without what the process masks. What is no file, such as a pipe, is written as it is.

    Raises: OSError that names the file.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(path.resolve(), data, mode)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(target: Path, data: bytes, mode: int) -> None:
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    is_new = not target.exists()
    descriptor = open_descriptor(new, WRITING | os.O_TRUNC, mode if is_new else 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not is_new:
            shutil.copymode(target, new)
        replace_file(new, target)
    except BaseException:
        delete_file(new)
        raise
