"""The `store.json` of a folder that stands for GGUF files: their names, and the state in which they were seen."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_moe.errors import StoreCorrupt, StoreError
from offload_moe.store.durable import write_file
from offload_moe.system.paths import MANIFEST_NAME

FORMAT_NAME = "offload-moe view of GGUF files"
FORMAT_VERSION = 2  # of 1: without stop tokens, and with errors in the config of some models


@dataclass(frozen=True, slots=True)
class View:
    """The GGUF files of one model, in order; source: the name that the user gave."""

    source: str
    paths: tuple[Path, ...]


def is_view(folder: Path) -> bool:
    """Whether a folder stands for GGUF files."""
    try:
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT_NAME


def read_view(folder: Path) -> View:
    """The files that a folder stands for. Raises: StoreError when one is gone or another; StoreCorrupt."""
    try:
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
        source, files = str(document["source"]), [(Path(name), state) for name, *state in document["files"]]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"{folder / MANIFEST_NAME} is malformed ({error!r}). Delete the folder.") from error
    for path, state in files:
        if not path.is_file() or _state(path) != state:
            raise StoreError(
                f"{path} is gone, or not the file any more that {folder} stands for. Name the GGUF file itself, and "
                f"remove this entry: `offload-moe rm {folder.name}`."
            )
    return View(source, tuple(path for path, _ in files))


def write_view(folder: Path, source: str, paths: Sequence[Path]) -> None:
    """Make a folder stand for these files."""
    document: dict[str, Any] = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "source": source,
        "files": [[str(path), *_state(path)] for path in paths],
    }
    write_file(folder / MANIFEST_NAME, json.dumps(document, indent=1).encode())


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
