"""What is kept of a forward over a calibration text: the inputs of each layer, in a folder beside the store."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from offload_moe.errors import StoreError
from offload_moe.store import durable
from offload_moe.store.beside import COMPLETE, OF_MODULES, SETTINGS, STATE, are_inputs, remove_inputs
from offload_moe.system.folders import make_folder
from offload_moe.system.progress import Progress

LAYER = "inputs-{:05}.safetensors"
HEAD = "inputs-head.safetensors"
DONE, HIDDEN = "num_done", "hidden"


class InputsFolder:
    """One file per layer, and the output of the last layer that finished: a stopped forward continues behind it."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._places: dict[str, Path] = {}
        self.num_done = 0
        self.hidden: Tensor | None = None

    def open(self, settings: Mapping[str, Any]) -> None:
        """Continue with a folder of these settings, or begin anew. Raises: StoreError, BudgetError, TransferError."""
        with durable.named_errors(self._folder):
            if self._claim(json.dumps(settings, sort_keys=True).encode()):
                self._restore()

    @property
    def is_complete(self) -> bool:
        """Whether the forward is over."""
        return (self._folder / COMPLETE).is_file()

    def complete(self) -> None:
        """The forward is over."""
        with durable.named_errors(self._folder):
            durable.write_file(self._folder / COMPLETE, b"")

    def has(self, name: str) -> bool:
        """Whether the module had inputs: experts of images have none."""
        return name in self._places

    def read(self, name: str) -> Tensor:
        """The inputs of a module, ``[T, K]``."""
        with safe_open(self._places[name], "pt") as file:
            values: Tensor = file.get_tensor(file.metadata()[name])
        return values

    def finish_layer(self, number: int, num_layers: int, inputs: Mapping[str, Tensor], hidden: Tensor | None) -> None:
        """As `InputsLog.finish_layer`."""
        if inputs:
            self._write(self._folder / LAYER.format(number), inputs)
        if hidden is not None:
            with durable.named_errors(self._folder):
                durable.write_file(self._folder / STATE, save({HIDDEN: hidden.contiguous()}, {DONE: str(number + 1)}))
        self._progress("Calibrating", (number + 1) / num_layers)

    def finish_head(self, inputs: Mapping[str, Tensor]) -> None:
        """As `InputsLog.finish_head`."""
        self._write(self._folder / HEAD, inputs)

    def remove(self) -> None:
        """As `remove_inputs`."""
        remove_inputs(self._folder)

    def _claim(self, settings: bytes) -> bool:
        """Whether there is something to continue."""
        if self._folder.exists() and not are_inputs(self._folder):
            raise StoreError(f"{self._folder} is not empty and not ours. Delete it, or choose another folder.")
        path = self._folder / SETTINGS
        if path.is_file():
            if path.read_bytes() == settings:
                return True
            self.remove()
        make_folder(self._folder)
        durable.write_file(path, settings)
        return False

    def _restore(self) -> None:
        state = self._folder / STATE
        try:
            if state.is_file():
                with safe_open(state, "pt") as file:
                    self.num_done, self.hidden = int(file.metadata()[DONE]), file.get_tensor(HIDDEN)
            done = (self._folder / LAYER.format(number) for number in range(self.num_done))
            for path in self._folder.glob(OF_MODULES) if self.is_complete else done:
                if path.is_file():
                    self._find(path)
        except (SafetensorError, KeyError, ValueError):  # damaged: the forward begins anew
            self.num_done, self.hidden, self._places = 0, None, {}
            durable.remove(self._folder / COMPLETE)

    def _find(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self._places |= dict.fromkeys(file.metadata(), path)

    def _write(self, path: Path, inputs: Mapping[str, Tensor]) -> None:
        """Modules that share their inputs share a tensor."""
        owners = {id(values): name for name, values in inputs.items()}
        tensors = {owners[id(values)]: values.contiguous() for values in inputs.values()}
        with durable.named_errors(self._folder):
            durable.write_file(path, save(tensors, {name: owners[id(values)] for name, values in inputs.items()}))
        self._places |= dict.fromkeys(inputs, path)
