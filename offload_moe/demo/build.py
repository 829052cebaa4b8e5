"""The demo model: built once, cached, and visible only when complete."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from offload_moe.demo.source import MODEL_NAME, WHEEL_BYTES, WHEEL_SHA256, fetch_dense
from offload_moe.demo.split import digest, parse_split, split_bytes
from offload_moe.demo.write import write_checkpoint
from offload_moe.system import paths
from offload_moe.system.locks import lock_file

Progress = Callable[[str, float], None]

_FETCH_END = 0.70  # share of a build's time; reading and writing take the rest
# Raise it when this code builds different bytes from the same files.
_REVISION = "4"


def checkpoint(*, progress: Progress | None = None, cache_dir: Path | None = None) -> Path:
    """The folder of the demo model: an ordinary Qwen2-MoE checkpoint, built at the first call.

    `progress` receives a message and the finished share, 0 to 1. `cache_dir`: None takes the user's cache folder.
    Concurrent processes build once. A rebuild gives the same bytes on the same machine.

    Raises: TransferError when the dense model cannot be fetched, CheckpointError when it is not the pinned one.
    """
    report = progress or _silent
    root = paths.cache_dir() if cache_dir is None else cache_dir
    folder = checkpoint_folder(root)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        report("waiting for another process that builds the demo model", 0.0)

    with lock_file(folder.with_name(f"{folder.name}.lock"), wait):
        if not folder.exists():
            _build(folder, root / "downloads", report)
    return folder


def checkpoint_folder(cache_dir: Path) -> Path:
    """The folder of this version's demo model in a cache folder."""
    return cache_dir / "demo" / f"{MODEL_NAME}-MoE-{digest(split_bytes(), WHEEL_SHA256, _REVISION)}"


def _silent(message: str, share: float) -> None:
    pass


def _build(folder: Path, downloads: Path, report: Progress) -> None:
    """Build beside `folder`, then rename, so that a killed build leaves nothing under the final name."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    message = f"fetching {MODEL_NAME} ({WHEEL_BYTES / 1e6:.0f} MB)"
    report(message, 0.0)
    dense = fetch_dense(downloads, lambda share: report(message, _FETCH_END * share))
    report("splitting layers into experts", _FETCH_END)
    partial.mkdir()
    write_checkpoint(partial, dense, parse_split(split_bytes()), torch.bfloat16)
    _sync(partial)
    os.replace(partial, folder)
    report("demo model ready", 1.0)


def _sync(folder: Path) -> None:
    """Flush every file, so that the rename does not reach the disk before the bytes do."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
