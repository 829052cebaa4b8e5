"""The formats of checkpoints, and the reader of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.bitsandbytes4 import bitsandbytes
from offload_moe.checkpoint.compressed import compressed_tensors
from offload_moe.checkpoint.fp8 import FP8_DTYPES, fbgemm, fp8_tensors, modelopt
from offload_moe.checkpoint.gguf_tensors import GgufTensors, parts_in
from offload_moe.checkpoint.gptq import auto_round, awq, gptq
from offload_moe.checkpoint.mxfp4 import BLOCKS, Mxfp4Tensors
from offload_moe.checkpoint.shards import Remote, Shards
from offload_moe.checkpoint.skeleton import read_config_json
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError

SETTINGS_KEYS = ("quantization_config", "compression_config")
# Files beside config.json, with the method of those whose settings do not name it.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
READERS: dict[str, Callable[[TensorSource, dict[str, Any]], DequantizedTensors]] = {
    "fp8": fp8_tensors,
    "fbgemm_fp8": fbgemm,
    "modelopt": modelopt,
    "mxfp4": Mxfp4Tensors,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,
    "bitsandbytes": bitsandbytes,
}
READ_WHEN_OPENED = ("bitsandbytes",)
# Settings that identify a method without a name.
SIGNS = {"config_groups": "compressed-tensors", "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes"}
# Suffixes of tensors that are parts of a quantized weight.
MARKS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "SCB": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "q_weight": "EXL2",
    "trellis": "EXL3",
}


def open_tensors(folder: Path, remote: Remote | None = None) -> TensorSource:
    """The tensors of a checkpoint folder as numbers, whatever their stored format.

    remote: fetches missing shards.

    Raises:
    CheckpointError: the folder is damaged, or quantized in an unsupported format.
    """
    if remote is None and _is_gguf(folder):
        return as_numbers(GgufTensors(parts_in(folder), read_config_json(folder)))
    settings = quantization_settings(folder)
    if settings is None:
        stored = Shards(folder, remote)
        _check_is_plain(stored, folder)
        return stored
    method = settings["quant_method"]
    if method not in READERS:
        raise CheckpointError(
            f"{folder} is already quantized ({method}), which this version cannot read. Use a version of the model in "
            f"bf16, fp16, fp32 or one of: {', '.join(READERS)}."
        )
    if remote is not None and method in READ_WHEN_OPENED:
        raise CheckpointError(
            f"A checkpoint quantized by {method} cannot be converted shard by shard: opening it reads them all. "
            "Convert it without --delete-source-shards."
        )
    return READERS[method](Shards(folder, remote), settings)


def as_numbers(found: GgufTensors) -> TensorSource:
    """Tensors of GGUF files; MXFP4 experts of gpt-oss, which are joined as blocks and scales, as numbers."""
    return Mxfp4Tensors(found, {}) if any(name.endswith(BLOCKS) for name in found.entries) else found


def is_mxfp4(folder: Path) -> bool:
    """Whether the experts of a checkpoint are in MXFP4. A GGUF file may have another type than the config."""
    settings = quantization_settings(folder)
    if settings is None or settings["quant_method"] != "mxfp4":
        return False
    return not _is_gguf(folder) or GgufTensors(parts_in(folder), read_config_json(folder)).is_mxfp4


def _is_gguf(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors*")) and any(folder.glob("*.gguf"))


def quantization_settings(folder: Path) -> dict[str, Any] | None:
    """The quantization settings in the config, a part of it such as its `text_config`, or a file beside it.

    `quant_method` is always set, possibly to an unknown name.

    Raises: CheckpointError when they are not an object.
    """
    raw = read_config_json(folder)
    configs = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    for key in SETTINGS_KEYS:
        for config in configs:
            if settings := config.get(key):
                if not isinstance(settings, dict):
                    raise CheckpointError(f"{folder / 'config.json'}: {key} is {settings!r}, expected an object.")
                default = next((SIGNS[sign] for sign in SIGNS if sign in settings), "in a way without a name")
                # MLX stores the same object under two keys.
                default = "MLX" if config.get("quantization") == settings else default
                return {"quant_method": default} | _lower(settings)
    of_mlx = raw.get("quantization")
    if isinstance(of_mlx, dict) and {"bits", "group_size"} <= of_mlx.keys():
        return {"quant_method": "MLX"} | of_mlx
    return _settings_beside(folder)


def _settings_beside(folder: Path) -> dict[str, Any] | None:
    for name, method in SETTINGS_FILES.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Download it again.") from error
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path} is {type(settings).__name__}, expected an object. Download it again.")
        return {"quant_method": method} | _lower(settings)
    return None


def _lower(settings: dict[str, Any]) -> dict[str, Any]:
    """`quant_method` in lower case, since AutoAWQ and others vary; left out if empty."""
    method = settings.get("quant_method")
    others = {key: value for key, value in settings.items() if key != "quant_method"}
    return others | {"quant_method": str(method).lower()} if method else others


def _check_is_plain(stored: Shards, folder: Path) -> None:
    """Refuse quantized weights without settings. Raises: CheckpointError."""
    for name, entry in stored.entries.items():
        mark = name.rpartition(".")[2]
        kind = MARKS.get(mark) or ("FP8" if entry.dtype in FP8_DTYPES else None)
        if kind is not None:
            raise CheckpointError(
                f"{entry.path}: tensor {name} is quantized ({kind}), but neither config.json nor one of "
                f"{', '.join(SETTINGS_FILES)} in {folder} says how. Take the config.json that was published with these "
                "weights, or use a version of the model in bf16."
            )
