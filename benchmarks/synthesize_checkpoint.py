"""Write a Hugging Face checkpoint of a real model's shape with random weights: shards, index and config, no tokenizer.

Usage: python benchmarks/synthesize_checkpoint.py CONFIG_FILE FOLDER [--layers 2] [--dense-layers 1]

Names and shapes are those of the published checkpoints: transformers' own conversions, run backwards. The format is
what the config says: FP8 with block scales, MXFP4, and else bf16. Weights have zero mean (with a mean, every token
collapses onto the same experts) and unit gain.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import finish
from torch import Tensor

from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.skeleton import build_skeleton, load_config
from offload_moe.checkpoint.weight_files import INDEX_NAME
from offload_moe.store.plan import Blob, PlannedFile, plan_files

POOL_ITEMS = 32 << 20
SHARD_BYTES = 5 * 10**9
FP8_BLOCK = 128
FP8_STD = 64.0  # of the codes; the largest is 448
MXFP4_STD = 2.93  # of codes drawn evenly
ROUTER_GAIN = 2.0  # router logits of this spread give a top-k that differs from token to token
NOT_FP8 = ("embed", "lm_head", "norm", "router", "mlp.gate.weight", "eh_proj")


class Pool:
    """Tensors that are runs of one pool of random numbers per gain, so that writing is as fast as the disk."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._pools: dict[tuple[torch.dtype, float], Tensor] = {}

    def rows(self, blob: Blob) -> Iterator[Tensor]:
        """The blob's items in pieces no longer than the pool."""
        remaining = math.prod(blob.shape)
        while remaining:
            count = min(remaining, POOL_ITEMS // 2)
            yield self._draw(blob, count)
            remaining -= count

    def _draw(self, blob: Blob, count: int) -> Tensor:
        if (constant := constant_of(blob)) is not None:
            return torch.full((count,), constant).to(blob.dtype)
        pool = self._pool(blob.dtype, deviation(blob))
        start = int(self._random.integers(0, POOL_ITEMS - count + 1))
        return pool[start : start + count]

    def _pool(self, dtype: torch.dtype, std: float) -> Tensor:
        key = (dtype, std)
        if key not in self._pools:
            if len(self._pools) > 3:
                self._pools.clear()
            if dtype == torch.uint8:
                self._pools[key] = torch.randint(0, 256, (POOL_ITEMS,), dtype=torch.uint8, generator=self._generator)
            else:
                normal = torch.randn(POOL_ITEMS, generator=self._generator).mul_(std)
                limit = 448.0 if dtype == torch.float8_e4m3fn else math.inf
                self._pools[key] = normal.clamp_(-limit, limit).to(dtype)
        return self._pools[key]


def constant_of(blob: Blob) -> float | None:
    """What vectors and scales hold; None for random matrices."""
    if blob.name.endswith("_scale_inv"):
        return 1 / (FP8_STD * math.sqrt(blob.shape[-1] * FP8_BLOCK))
    if blob.name.endswith("_scales"):
        return 127 + round(math.log2(1 / (MXFP4_STD * math.sqrt(blob.shape[-1] * 32))))
    if "bias" in blob.name.rpartition(".")[2] or "sinks" in blob.name:
        return 0.0
    return 1.0 if len(blob.shape) == 1 else None


def deviation(blob: Blob) -> float:
    if blob.dtype == torch.float8_e4m3fn:
        return FP8_STD
    if "embed" in blob.name or blob.name in ("shared.weight",):
        return 1.0
    is_router = blob.name.endswith(("gate.weight", "router.weight", "classifier.weight"))
    return (ROUTER_GAIN if is_router else 1.0) / math.sqrt(blob.shape[-1])


def checkpoint_blobs(config_folder: Path) -> list[Blob]:
    """Every tensor of the published checkpoint in the order of its layers; shapes come from the skeleton."""
    from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

    config = load_config(config_folder)
    model = build_skeleton(config)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name not in tied}
    settings = getattr(config, "quantization_config", None) or {}
    packed = set()
    if settings.get("quant_method") == "mxfp4":
        packed = {f"{layer.name}.{matrix.name}" for layer in find_experts(model) for matrix in layer.shape.matrices}
    tensors = revert_weight_conversion(model, state)
    is_fp8 = settings.get("quant_method") == "fp8"
    return [
        blob for name in sorted(tensors, key=dot_natural_key) for blob in _stored(name, tensors[name], is_fp8, packed)
    ]


def _stored(name: str, tensor: Tensor, is_fp8: bool, packed: set[str]) -> Iterator[Blob]:
    shape = tuple(tensor.shape)
    if name in packed:
        experts, columns, rows = shape
        yield _blob(f"{name}_blocks", torch.uint8, (experts, rows, columns // 32, 16))
        yield _blob(f"{name}_scales", torch.uint8, (experts, rows, columns // 32))
    elif is_fp8 and len(shape) == 2 and not any(part in name for part in NOT_FP8):
        yield _blob(name, torch.float8_e4m3fn, shape)
        yield _blob(f"{name}_scale_inv", torch.float32, tuple(-(-size // FP8_BLOCK) for size in shape))
    else:
        yield _blob(name, torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, shape)


def _blob(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Blob:
    return Blob(name=name, dtype=dtype, shape=shape, num_bytes=math.prod(shape) * dtype.itemsize)


def cut(raw: dict[str, Any], layers: int | None, dense_layers: int | None) -> dict[str, Any]:
    """The config with fewer layers: of each stack where there is an encoder, and with fewer dense ones before."""
    text = raw.get("text_config", raw)
    if layers is not None:
        for key in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
            if key in text:
                text[key] = layers
        for stack in ("encoder", "decoder"):
            if f"num_sparse_{stack}_layers" in text:
                text[f"num_sparse_{stack}_layers"] = max(1, layers // text[f"{stack}_sparse_step"])
        for key in ("layer_types", "moe_layers", "no_rope_layers"):
            if isinstance(text.get(key), list):
                text[key] = [item for item in text[key] if not isinstance(item, int) or item < layers][:layers]
    if dense_layers is not None and "first_k_dense_replace" in text:
        text["first_k_dense_replace"] = dense_layers
    return raw


def synthesize(config_file: Path, folder: Path, *, layers: int | None, dense_layers: int | None, seed: int) -> int:
    """Write the checkpoint; returns its bytes."""
    folder.mkdir(parents=True)
    raw = cut(json.loads(config_file.read_text()), layers, dense_layers)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    files = plan_files("model", checkpoint_blobs(folder), SHARD_BYTES)
    pool = Pool(seed)
    for file in files:
        _write(folder / file.name, file, pool)
    weight_map = {blob.name: file.name for file in files for blob in file.blobs}
    total = sum(blob.num_bytes for file in files for blob in file.blobs)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def _write(path: Path, file: PlannedFile, pool: Pool) -> None:
    with path.open("wb") as stream:
        stream.write(file.header)
        for blob in file.blobs:
            for piece in pool.rows(blob):
                stream.write(piece.view(torch.uint8).numpy().data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="keep only that many decoder layers")
    parser.add_argument("--dense-layers", type=int, help="of which that many without experts, where the model has such")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    num_bytes = synthesize(
        options.config, options.folder, layers=options.layers, dense_layers=options.dense_layers, seed=options.seed
    )
    finish({"benchmark": "synthesize_checkpoint", "shape": options.config.stem, "checkpoint_bytes": num_bytes})
    return 0


if __name__ == "__main__":
    sys.exit(main())
