"""Which format a checkpoint's weights are in, and how each is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.bitsandbytes4 import bitsandbytes
from offload_moe.checkpoint.fp8 import fp8_tensors
from offload_moe.checkpoint.gguf_tensors import GgufTensors
from offload_moe.checkpoint.integers import awq, compressed_tensors, gptq
from offload_moe.checkpoint.mxfp4 import BLOCKS, Mxfp4Tensors
from offload_moe.checkpoint.shards import Remote, Shards
from offload_moe.checkpoint.skeleton import read_config_json
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError

SETTINGS_KEYS = ("quantization_config", "compression_config")
READERS: dict[str, Callable[[TensorSource, dict[str, Any]], DequantizedTensors]] = {
    "fp8": fp8_tensors,
    "mxfp4": Mxfp4Tensors,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
}

READ_WHEN_OPENED = ("bitsandbytes",)


def open_tensors(folder: Path, remote: Remote | None = None) -> TensorSource:
    """The tensors of a checkpoint folder as numbers, whatever they are stored as.

    remote: brings shards that are not there.

    Raises:
        CheckpointError: the folder is damaged, or quantized in a way that cannot be read.
    """
    if remote is None and not any(folder.glob("*.safetensors*")) and any(folder.glob("*.gguf")):
        found = GgufTensors(folder, read_config_json(folder))
        return Mxfp4Tensors(found, {}) if any(name.endswith(BLOCKS) for name in found.entries) else found
    settings = quantization_settings(folder)
    method = settings.get("quant_method") if settings else None
    if settings and method not in READERS:
        raise CheckpointError(
            f"{folder} is already quantized ({method}), which this version cannot read. Use a version of the model in "
            f"bf16, fp16, fp32 or one of: {', '.join(READERS)}."
        )
    if remote is not None and method in READ_WHEN_OPENED:
        raise CheckpointError(
            f"A checkpoint quantized by {method} cannot be converted shard by shard: opening it reads them all. "
            "Convert it without --delete-source-shards."
        )
    stored = Shards(folder, remote)
    return READERS[str(method)](stored, settings) if settings else stored


def quantization_settings(folder: Path) -> dict[str, Any] | None:
    """What the config, or a part of it such as its `text_config`, says of quantized weights.

    Raises: CheckpointError when that is not an object.
    """
    raw = read_config_json(folder)
    configs = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    for key in SETTINGS_KEYS:
        for config in configs:
            if settings := config.get(key):
                if not isinstance(settings, dict):
                    raise CheckpointError(f"{folder / 'config.json'}: {key} is {settings!r}, expected an object.")
                return settings
    return None
