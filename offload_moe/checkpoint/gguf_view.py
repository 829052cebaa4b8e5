"""A GGUF file in place of a model folder: the small files that transformers reads, out of its metadata."""

import json
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.gguf_config import config_of
from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.checkpoint.gguf_tokenizer import write_tokenizer
from offload_moe.errors import CheckpointError
from offload_moe.system.paths import CONFIG_NAME


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, without its vocabulary. Raises: CheckpointError."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        return dict(read_gguf_metadata(str(path))[0])
    except Exception as error:  # the reader does not check its file, so a damaged one may raise anything
        raise CheckpointError(f"{path} is not a GGUF file, or a damaged one: {error!r}. Download it again.") from error


def write_small_files(paths: tuple[Path, ...], folder: Path) -> None:
    """Write config and tokenizer of a model in GGUF into a folder. Raises: CheckpointError."""
    first = paths[0]
    metadata = read_metadata(first)
    _, tensors = read_gguf(paths)
    config = config_of(first, metadata, {name: tensor.shape for name, tensor in tensors.items()})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(first, folder)
