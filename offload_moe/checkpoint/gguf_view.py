"""A GGUF file in place of a model folder: the small files that transformers reads, out of its metadata."""

import json
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.gguf_config import config_of
from offload_moe.checkpoint.gguf_file import GgufModel, read_gguf
from offload_moe.checkpoint.gguf_metadata import Metadata
from offload_moe.checkpoint.gguf_rope import FACTORS, with_factors
from offload_moe.checkpoint.gguf_stops import write_stops
from offload_moe.checkpoint.gguf_tokenizer import write_tokenizer
from offload_moe.errors import CheckpointError
from offload_moe.system.paths import CONFIG_NAME


def write_small_files(paths: tuple[Path, ...], folder: Path, *, has_data: bool = True) -> None:
    """Write config, tokenizer and stop tokens of a model in GGUF into a folder.

    has_data: whether the files are whole, not only their headers. Raises: CheckpointError.
    """
    first = paths[0]
    model = read_gguf(paths)
    if model.is_swapped:
        raise CheckpointError(
            f"{first} is a big-endian GGUF file, which is not used as it lies. Use a little-endian file; or put "
            "config.json and tokenizer.json of the original model beside it, in a folder, and quantize that folder."
        )
    config = _config(first, model, has_data)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = write_tokenizer(first, model.metadata, folder)
    if tokenizer is not None:
        write_stops(model.metadata, tokenizer, folder)


def _config(path: Path, model: GgufModel, has_data: bool) -> dict[str, Any]:
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    config = config_of(path, model.metadata, shapes)
    if (factors := model.tensors.get(FACTORS)) is not None and has_data:
        found = Metadata(path, model.metadata, shapes)
        values = factors.rows(0, factors.shape[0]).flatten().tolist()
        rope = config["rope_parameters"]
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        config["head_dim"] = width  # which transformers needs for this rotation
        turned = round(width * rope.get("partial_rotary_factor", 1))
        config["rope_parameters"] = with_factors(found, rope, values, turned // 2)
    return config
