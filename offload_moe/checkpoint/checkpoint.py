"""A Hugging Face checkpoint, opened for reading expert by expert."""

from pathlib import Path
from types import TracebackType
from typing import Self

from offload_moe.checkpoint.adapter import AdaptedTensors, Adapter
from offload_moe.checkpoint.formats import as_numbers, open_tensors
from offload_moe.checkpoint.gguf_tensors import GgufTensors
from offload_moe.checkpoint.mtp import MtpWeights, find_mtp
from offload_moe.checkpoint.names import map_names
from offload_moe.checkpoint.shards import Remote
from offload_moe.checkpoint.skeleton import build_skeleton, load_config, read_config_json
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.checkpoint.unused import with_a_meaning
from offload_moe.checkpoint.weights import ModelWeights
from offload_moe.errors import CheckpointError


class Checkpoint(ModelWeights):
    """A checkpoint folder.

    `mtp` is its layer for multi-token prediction; None where it has none that is whole and known. `ignored` are tensors
    that transformers leaves out as well and `mtp` does not have (old buffers, tensors outside the language model if
    only that is built, other layers for multi-token prediction). `notices` are for the user.
    """

    def __init__(
        self,
        folder: Path,
        remote: Remote | None = None,
        gguf: tuple[Path, ...] = (),
        adapter: Adapter | None = None,
    ) -> None:
        """Opens the folder and checks every header against the model.

        remote: fetches missing shards when they are read. gguf: files with the tensors, which lie elsewhere.
        adapter: is merged into weights as they are read.

        Raises:
            CheckpointError: not a model folder, or a tensor is missing, unexpected, or of a wrong shape or dtype.
            UnsupportedModelError: a dense model, or one with experts that cannot be bound.
        """
        model = build_skeleton(load_config(folder))
        self.gguf = GgufTensors(gguf, read_config_json(folder)) if gguf else None
        stored = open_tensors(folder, remote) if self.gguf is None else as_numbers(self.gguf)
        tensors: TensorSource = stored if adapter is None else AdaptedTensors(stored, adapter)
        super().__init__(folder, model, tensors)
        can_read = remote is None
        names = map_names(model, tensors.entries)
        if unexpected := with_a_meaning(tensors, names.unexpected, may_read=can_read):
            entry = tensors.entries[unexpected[0]]
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name} has no place in {type(model).__name__} "
                f"({len(unexpected)} such tensors). Use another version of the model, such as its authors' own."
            )
        notices = self.match(names.groups, can_compare=can_read)
        self.mtp: MtpWeights | None
        self.mtp, of_mtp = find_mtp(folder, model, tensors, names.ignored, can_read=can_read)
        taken = self.mtp.sources if self.mtp is not None else frozenset()
        self.ignored = tuple(name for name in names.ignored if name not in taken)
        self.notices = (*tensors.notices, *notices, *of_mtp)

    def close(self) -> None:
        self.tensors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
