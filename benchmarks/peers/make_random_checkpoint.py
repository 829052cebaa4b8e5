"""Write a bf16 checkpoint of a model's shape with random weights, one shard per layer, as the hub has them.

Usage: python benchmarks/peers/make_random_checkpoint.py CONFIG.json FOLDER [--layers N]

For models whose experts are called gate_proj, up_proj and down_proj (OLMoE, Qwen3-MoE). For speed only.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.skeleton import build_skeleton, load_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import finish

POOL = 1 << 26


class RandomWeights:
    """Runs of one pool of normal numbers, so that writing is as fast as the disk."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(POOL, generator=self._generator).to(torch.bfloat16)

    def make(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 2:
            return (
                torch.zeros(shape, dtype=torch.bfloat16) if "bias" in name else torch.ones(shape, dtype=torch.bfloat16)
            )
        count = math.prod(shape)
        start = int(torch.randint(POOL, (), generator=self._generator))
        fits = start + count <= POOL
        run = self._pool[start:] if fits else self._pool.roll(-start).repeat(-(-count // POOL))
        numbers = run[:count].view(shape)
        gain = 2.0 if name.endswith("gate.weight") else 1.0
        return numbers * (gain if "embed" in name else gain / math.sqrt(shape[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    raw = json.loads(options.config.read_text())
    raw["num_hidden_layers"] = options.layers or raw["num_hidden_layers"]
    raw["dtype"] = "bfloat16"
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "config.json").write_text(json.dumps(raw, indent=1))
    model = build_skeleton(load_config(options.folder))
    experts = find_experts(model)
    fused = {name for layer in experts for name in layer.parameter_names()}
    random = RandomWeights()
    index: dict[str, str] = {}

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        shard = f"model-{number:05d}.safetensors"
        save_file({name: random.make(name, shape) for name, shape in shapes.items()}, options.folder / shard)
        index.update(dict.fromkeys(shapes, shard))

    write(0, {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in fused})
    for number, layer in enumerate(experts, 1):
        last = layer.shape.matrices[1]
        hidden, intermediate = last.out_features, last.in_features
        of_one = {
            "gate_proj": (intermediate, hidden),
            "up_proj": (intermediate, hidden),
            "down_proj": (hidden, intermediate),
        }
        write(
            number,
            {
                f"{layer.name}.{expert}.{part}.weight": shape
                for expert in range(layer.num_experts)
                for part, shape in of_one.items()
            },
        )
    document = {"metadata": {}, "weight_map": index}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(document))
    num_bytes = sum(file.stat().st_size for file in options.folder.iterdir())
    finish({"benchmark": "make_random_checkpoint", "shape": options.config.stem, "checkpoint_bytes": num_bytes})


if __name__ == "__main__":
    main()
