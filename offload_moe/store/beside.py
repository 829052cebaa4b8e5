"""The folders beside a store that exist only while it is made: inputs of a calibration, and downloaded shards."""

import os
from pathlib import Path

from offload_moe.checkpoint.download import is_download, remove_download
from offload_moe.store import durable
from offload_moe.system.names import DOWNLOAD, INPUTS

SETTINGS = "calibration.json"  # identifies a folder of inputs
STATE = "state.safetensors"
COMPLETE = "complete"
OF_MODULES = "inputs-*.safetensors"


def beside(store: Path, suffix: str) -> Path:
    """The folder of that suffix beside a store."""
    path = Path(os.path.abspath(store))  # such as `.`, which has no name
    return path.with_name(path.name + suffix)


def bytes_beside(store: Path) -> int:
    """Bytes of the files that a conversion keeps beside a store."""
    return sum(path.stat().st_size for folder in _folders(store) for path in folder.rglob("*") if path.is_file())


def remove_beside(store: Path) -> None:
    """Delete what a conversion keeps beside a store, except for foreign files.

    Raises: StoreError when a download is in use; TransferError.
    """
    remove_inputs(beside(store, INPUTS))
    if is_download(download := beside(store, DOWNLOAD)):
        remove_download(download)


def remove_inputs(folder: Path) -> None:
    """Delete a folder of inputs, except for foreign files; nothing of a folder that is not ours. Raises: TransferError.

    The settings are deleted last, because they identify the folder after a kill.
    """
    if not are_inputs(folder):
        return
    with durable.named_errors(folder):
        for name in (OF_MODULES, STATE, COMPLETE, SETTINGS):
            for path in (*folder.glob(name + durable.PART), *folder.glob(name)):
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def are_inputs(folder: Path) -> bool:
    """Whether the folder is one of inputs, or what a kill at its beginning or end left of it."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return (folder / SETTINGS).is_file() or {path.name for path in folder.iterdir()} <= {SETTINGS + durable.PART}


def _folders(store: Path) -> list[Path]:
    inputs, download = beside(store, INPUTS), beside(store, DOWNLOAD)
    return [folder for folder, is_ours in ((inputs, are_inputs), (download, is_download)) if is_ours(folder)]
