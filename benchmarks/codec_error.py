"""How far each codec is from the weights it stands for: relative error of every expert matrix of a checkpoint.

Usage: python benchmarks/codec_error.py CHECKPOINT [--experts-per-layer 8]

The relative error of a matrix W is |decode(encode(W)) - W| / |W|, Frobenius norms. Without a checkpoint: the demo's.
"""

import argparse
import sys
from pathlib import Path

import harness
import torch

from offload_moe import demo
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.native.kernels import fast_encoding
from offload_moe.quant import ABSMAX, LEAST_ERROR, get_codec

CODECS = {
    "bf16": ("bf16", ABSMAX),
    "int8 absmax": ("int8", ABSMAX),
    "int8": ("int8", LEAST_ERROR),
    "nf4 absmax": ("nf4", ABSMAX),
    "nf4": ("nf4", LEAST_ERROR),
    "mxfp4": ("mxfp4", ABSMAX),
}


def errors(folder: Path, experts_per_layer: int) -> dict[str, dict[str, list[tuple[float, str]]]]:
    """codec -> matrix -> the error of each expert's, with its name."""
    found: dict[str, dict[str, list[tuple[float, str]]]] = {codec: {} for codec in CODECS}
    with Checkpoint(folder) as checkpoint:
        for ordinal, layer in enumerate(checkpoint.layers):
            step = max(1, layer.num_experts // experts_per_layer)
            for expert in range(0, layer.num_experts, step):
                tensors = checkpoint.expert(ordinal, expert)
                for name, (codec_name, scales) in CODECS.items():
                    codec = get_codec(codec_name)
                    record = fast_encoding(codec, scales).encode(layer.shape, tensors)
                    decoded = codec.decode(layer.shape, record, torch.float32)
                    for matrix in layer.shape.matrices:
                        weight = tensors[matrix.name].float()
                        error = float((decoded[matrix.name] - weight).norm() / weight.norm())
                        found[name].setdefault(matrix.name, []).append((error, f"{layer.name}.{expert}"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--experts-per-layer", type=int, default=8)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    folder = options.checkpoint or demo.checkpoint()
    found = errors(folder, options.experts_per_layer)
    summary = {}
    for codec, matrices in found.items():
        for matrix, values in matrices.items():
            worst = max(values)
            summary[f"{codec} {matrix}"] = harness.spread([error for error, _ in values]) | {
                "count": len(values),
                "worst": worst[1],
            }
            print(f"{codec:11} {matrix:13} {summary[f'{codec} {matrix}']}")
    harness.finish({"benchmark": "relative error of codecs", "checkpoint": folder.name, "errors": summary})
    return 0


if __name__ == "__main__":
    sys.exit(main())
