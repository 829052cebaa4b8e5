"""A GGUF file in place of a model folder: the small files that transformers reads, out of its metadata."""

import json
from pathlib import Path

from offload_moe.checkpoint.gguf_config import config_of
from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.checkpoint.gguf_tokenizer import write_tokenizer
from offload_moe.errors import CheckpointError
from offload_moe.system.paths import CONFIG_NAME


def write_small_files(paths: tuple[Path, ...], folder: Path) -> None:
    """Write config and tokenizer of a model in GGUF into a folder. Raises: CheckpointError."""
    first = paths[0]
    model = read_gguf(paths)
    if model.is_swapped:
        raise CheckpointError(
            f"{first} is a big-endian GGUF file, which is not used as it lies. Use a little-endian file; or put "
            "config.json and tokenizer.json of the original model beside it, in a folder, and quantize that folder."
        )
    config = config_of(first, model.metadata, {name: tensor.shape for name, tensor in model.tensors.items()})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(first, model.metadata, folder)
