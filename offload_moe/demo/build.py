"""The demo model: built once, cached, and visible only when complete."""

import os
import shutil
from pathlib import Path

import torch

from offload_moe.demo.source import MODEL_NAME, WHEEL_SHA256, fetch_dense
from offload_moe.demo.split import digest, parse_split, split_bytes
from offload_moe.demo.write import write_checkpoint
from offload_moe.system import paths
from offload_moe.system.folders import make_folder, sync_folder
from offload_moe.system.locks import lock_file
from offload_moe.system.names import DEMOS
from offload_moe.system.open_files import replace_file
from offload_moe.system.progress import Progress, silent

# Raise it when this code changes what it builds from the same files.
_REVISION = "4"


def checkpoint(*, progress: Progress = silent, cache_dir: Path | None = None) -> Path:
    """The folder of the demo model: an ordinary Qwen2-MoE checkpoint, built at the first call.

    `cache_dir` is the user's cache folder when it is None.
    Processes that call this at once build once. A rebuild gives the same bytes on the same machine.

    Raises: TransferError when the dense model cannot be fetched, CheckpointError when it is not the pinned one,
        BudgetError for a full disk.
    """
    root = paths.cache_dir() if cache_dir is None else cache_dir
    folder = checkpoint_folder(root)
    if folder.exists():
        return folder
    make_folder(folder.parent)

    def wait() -> None:
        progress("waiting for another process that builds the demo model")

    with lock_file(folder.with_name(f"{folder.name}.lock"), wait):
        if not folder.exists():
            _build(folder, root / "downloads", progress)
    return folder


def checkpoint_folder(cache_dir: Path) -> Path:
    """Where the demo model of this version lies in a cache folder, once it is built."""
    return cache_dir / DEMOS / f"{MODEL_NAME}-MoE-{digest(split_bytes(), WHEEL_SHA256, _REVISION)}"


def _build(folder: Path, downloads: Path, progress: Progress) -> None:
    """Build beside `folder`, then rename: a build that is killed leaves nothing under the final name."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dense = fetch_dense(downloads, progress)
    progress("splitting layers into experts")
    make_folder(partial)
    try:
        write_checkpoint(partial, dense, parse_split(split_bytes()), torch.bfloat16)
        _sync(partial)
        replace_file(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # of a full disk, it is most of what could be freed
        raise
    sync_folder(folder.parent)
    progress("demo model ready", 1.0)


def _sync(folder: Path) -> None:
    """Flush every file and its name, so that the rename does not reach the disk before they do."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
