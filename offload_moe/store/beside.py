"""The folders beside a store that exist only while it is made: inputs of a calibration, and downloaded shards."""

import os
from pathlib import Path

from offload_moe.checkpoint.download import is_download, remove_download
from offload_moe.store import durable
from offload_moe.system.folders import delete_file
from offload_moe.system.names import DOWNLOAD, INPUTS
from offload_moe.system.paths import names_in

SETTINGS = "calibration.json"  # identifies a folder of inputs
STATE = "state.safetensors"
COMPLETE = "complete"
OF_MODULES = "inputs-*.safetensors"


def beside(store: Path, suffix: str) -> Path:
    """The folder of that suffix beside a store."""
    path = Path(os.path.abspath(store))  # such as `.`, which has no name
    return path.with_name(path.name + suffix)


def folders_beside(store: Path) -> list[Path]:
    """The folders that a conversion keeps beside a store."""
    inputs, download = beside(store, INPUTS), beside(store, DOWNLOAD)
    return [folder for folder, is_ours in ((inputs, are_inputs), (download, is_download)) if is_ours(folder)]


def remove_beside(store: Path) -> None:
    """Delete what a conversion keeps beside a store, except for foreign files.

    Raises: StoreError when a download is in use; TransferError.
    """
    remove_inputs(beside(store, INPUTS))
    if is_download(download := beside(store, DOWNLOAD)):
        remove_download(download)


def remove_inputs(folder: Path) -> None:
    """Delete a folder of inputs, except for foreign files; nothing of a folder that is not ours. Raises: TransferError.

    After a kill the settings still identify the folder, and a conversion that is resumed misses no inputs: what says
    that they are there is deleted before them.
    """
    if not are_inputs(folder):
        return
    with durable.named_errors(folder):
        for name in (COMPLETE, STATE, OF_MODULES, SETTINGS):
            for path in (*folder.glob(name + durable.PART), *folder.glob(name)):
                delete_file(path)
        if not any(folder.iterdir()):
            folder.rmdir()


def are_inputs(folder: Path) -> bool:
    """Whether the folder is one of inputs, or what a kill at its beginning or end left of it."""
    names = names_in(folder)
    return names is not None and (SETTINGS in names or names <= {SETTINGS + durable.PART})
