"""Write an expert store of a real model's shape with random weights, straight in the store format.

Usage: python benchmarks/synthesize.py benchmarks/configs/OLMoE-1B-7B-0125.json STORE [--dense-codec nf4] [--layers N]

Weights have zero mean (with a mean, every token collapses onto the same experts) and unit gain. For speed only: the
text such a model writes is noise.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import finish
from torch import Tensor

from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.linears import projection_linears
from offload_moe.checkpoint.skeleton import build_skeleton, load_config
from offload_moe.quant import ExpertShape, Matrix, get_codec
from offload_moe.quant.mxfp4 import BIAS, E2M1_TABLE
from offload_moe.quant.nf4 import NF4_TABLE, dynamic_map
from offload_moe.store.manifest import DenseEntry, Layer, Manifest
from offload_moe.store.manifest_json import manifest_to_json
from offload_moe.store.order import order_of_codec
from offload_moe.store.plan import Blob, plan_files, record_blob
from offload_moe.store.writer import Payload, StoreWriter, describe_metadata, stored_files

POOL_BYTES = 64 << 20
ROUTER_GAIN = 2.0  # router logits of this spread give a top-k that differs from token to token


class RandomRecords:
    """Records whose codes are runs of one pool of random bytes, so that writing is as fast as the disk.

    All scales of a matrix are the same, so they are records in rows and in panels alike.
    """

    def __init__(self, codec_name: str, seed: int, shapes: Sequence[ExpertShape]) -> None:
        """shapes: of all records, for few bytes need no large pool."""
        self.codec = get_codec(codec_name)
        self._pool_bytes = min(POOL_BYTES, sum(self.codec.layout(shape).record_bytes for shape in shapes))
        self._random = np.random.default_rng(seed)
        codes = {"nf4": self._nf4_codes, "int8": self._int8_codes, "mxfp4": self._mxfp4_codes}[codec_name]
        self._pool = torch.from_numpy(codes())

    def record(self, shape: ExpertShape) -> Tensor:
        layout = self.codec.layout(shape)
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        for matrix in shape.matrices:
            codes = layout.view(record, f"{matrix.name}.codes").view(torch.uint8).view(-1)
            for piece in codes.split(self._pool_bytes // 2):  # a large vocabulary's head is longer than the pool
                start = int(self._random.integers(0, self._pool_bytes - piece.numel()))
                piece.copy_(self._pool[start : start + piece.numel()])
            std = 1 / math.sqrt(matrix.in_features)
            if self.codec.name == "nf4":
                layout.view(record, f"{matrix.name}.absmax").fill_(int((dynamic_map() == 0).nonzero()))
                layout.view(record, f"{matrix.name}.absmax_scale").fill_(1.0)
                layout.view(record, f"{matrix.name}.absmax_offset").fill_(std / self._code_std)
            elif self.codec.name == "mxfp4":
                layout.view(record, f"{matrix.name}.scales").fill_(BIAS + round(math.log2(std / self._code_std)))
            else:
                layout.view(record, f"{matrix.name}.scales").fill_(std / self._code_std)
        return record

    def _nf4_codes(self) -> np.ndarray:
        """Two codes a byte, drawn so that the mean of the table's values is zero."""
        table = np.array(NF4_TABLE)
        low, high = -5.0, 5.0
        while high - low > 1e-9:
            tilt = (low + high) / 2
            weights = np.exp(-tilt * table)
            low, high = (tilt, high) if (weights * table).sum() > 0 else (low, tilt)
        share = weights / weights.sum()
        self._code_std = math.sqrt((share * table**2).sum())
        nibbles = self._random.choice(16, size=2 * self._pool_bytes, p=share).astype(np.uint8)
        return nibbles[::2] << 4 | nibbles[1::2]

    def _mxfp4_codes(self) -> np.ndarray:
        self._code_std = float(np.std(E2M1_TABLE))
        return self._random.integers(0, 256, self._pool_bytes, np.uint8)

    def _int8_codes(self) -> np.ndarray:
        self._code_std = 40.0
        return self._random.normal(0, 40, self._pool_bytes).round().clip(-127, 127).astype(np.int8).view(np.uint8)


def dense_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A plain dense tensor: ones for norms, zeros for biases, unit gain for matrices."""
    if len(shape) < 2:
        return torch.zeros(shape, dtype=torch.bfloat16) if "bias" in name else torch.ones(shape, dtype=torch.bfloat16)
    gain = 1.0 if "embed" in name else ROUTER_GAIN / math.sqrt(shape[-1])
    return (torch.randn(shape, generator=generator) * gain).to(torch.bfloat16)


def synthesize(config_file: Path, folder: Path, *, codec: str, dense_codec: str, layers: int | None, seed: int) -> None:
    """Write the store. layers: keep only that many decoder layers."""
    raw = json.loads(config_file.read_text())
    if layers is not None:
        raw["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    config_folder = folder.with_name(folder.name + ".config")
    config_folder.mkdir(exist_ok=True)
    (config_folder / "config.json").write_text(json.dumps(raw, indent=1))
    model = build_skeleton(load_config(config_folder))
    experts = find_experts(model)
    linears = {
        name: ExpertShape(
            matrices=(Matrix(name="weight", out_features=linear.out_features, in_features=linear.in_features),),
            biases=(("bias", linear.out_features),) if linear.bias is not None else (),
        )
        for name, linear in projection_linears(model).items()
    }
    records = RandomRecords(codec, seed, [layer.shape for layer in experts for _ in range(layer.num_experts)])
    dense_records = RandomRecords(dense_codec, seed + 1, list(linears.values()))
    inside = {name for layer in experts for name in layer.parameter_names()}
    inside |= {f"{name}.{part}" for name, shape in linears.items() for part in shape.module_shapes()}
    tied = set(model.all_tied_weights_keys)
    plain = [(name, tuple(t.shape)) for name, t in model.state_dict().items() if name not in inside | tied]
    dense_blobs = [
        record_blob(
            f"{name}.weight",
            dense_records.codec.layout(shape).record_bytes,
            quantized=shape,
            order=order_of_codec(dense_codec),
        )
        for name, shape in linears.items()
    ] + [Blob(name=n, dtype=torch.bfloat16, shape=s, num_bytes=2 * math.prod(s)) for n, s in plain]
    expert_blobs = [
        record_blob(
            f"layers.{ordinal}.experts.{expert}",
            records.codec.layout(layer.shape).record_bytes,
            order=order_of_codec(codec),
        )
        for ordinal, layer in enumerate(experts)
        for expert in range(layer.num_experts)
    ]

    def payloads() -> Iterator[Payload]:
        generator = torch.Generator().manual_seed(seed)
        for shape in linears.values():
            yield [as_bytes(dense_records.record(shape))]
        for name, shape in plain:
            yield [as_bytes(dense_tensor(name, shape, generator))]
        for layer in experts:
            for _ in range(layer.num_experts):
                yield [as_bytes(records.record(layer.shape))]

    files = plan_files("dense", dense_blobs) + plan_files("experts", expert_blobs)
    metadata = {"config.json": (config_folder / "config.json").read_bytes()}
    with StoreWriter(folder, files, {"synthesized from": config_file.name, "seed": seed}) as writer:
        for _ in writer.write(payloads()):
            pass
        places = writer.places()
        num_dense = len(dense_blobs)
        manifest = Manifest(
            source=f"synthesized {config_file.stem}",
            revision=None,
            codec=codec,
            dense_codec=dense_codec,
            layers=tuple(
                Layer(
                    name=layer.name,
                    num_experts=layer.num_experts,
                    record_bytes=records.codec.layout(layer.shape).record_bytes,
                    shape=layer.shape,
                )
                for layer in experts
            ),
            files=stored_files(files),
            experts=tuple(places[num_dense:]),
            dense=tuple(
                DenseEntry(name=blob.name, dtype=blob.dtype, shape=blob.shape, place=place, quantized=blob.quantized)
                for blob, place in zip(dense_blobs, places[:num_dense], strict=True)
            ),
            metadata=describe_metadata(metadata),
        )
        writer.finish(manifest_to_json(manifest), metadata)


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--codec", choices=("nf4", "int8", "mxfp4"), default="nf4")
    parser.add_argument("--dense-codec", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    synthesize(
        options.config,
        options.store,
        codec=options.codec,
        dense_codec=options.dense_codec,
        layers=options.layers,
        seed=options.seed,
    )
    num_bytes = sum(file.stat().st_size for file in options.store.iterdir())
    finish({"benchmark": "synthesize", "shape": options.config.stem, "store_bytes": num_bytes})
    return 0


if __name__ == "__main__":
    sys.exit(main())
