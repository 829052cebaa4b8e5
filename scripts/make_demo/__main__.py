"""Make `offload_moe/demo/split.safetensors`: how SmolLM2-135M-Instruct becomes the demo model. Takes hours.

    python -m scripts.make_demo [TEXT ...] [--out FILE] [--steps N] [--scratch FOLDER]

Each TEXT is a file of documents with a form feed on a line of its own between them. The calibration text that lies
beside this file always comes first.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.demo.dense import DenseModel
from offload_moe.demo.source import fetch_dense
from offload_moe.system import paths
from scripts.make_demo.calibrate import calibrate
from scripts.make_demo.corpus import DOCUMENT_BREAK, pack_documents
from scripts.make_demo.distill import distill
from scripts.make_demo.export import save_split, to_split
from scripts.make_demo.layer_split import LayerSplit
from scripts.make_demo.recipe import Recipe
from scripts.make_demo.student import Student

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "offload_moe" / "demo" / "split.safetensors"
_NUM_FINISHING = 32  # sequences on which the routers' scale and zero point are fitted


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--steps", type=int, default=Recipe().num_steps, help="of training (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="keep the calibrated split here, and take it from here")
    arguments = parser.parse_args()
    recipe = Recipe(num_steps=arguments.steps)
    dense = fetch_dense(paths.cache_dir() / "downloads", lambda share: None)
    own, other = sequences(dense, arguments.texts, recipe)
    student = Student(dense, _calibrated(dense, own, recipe, arguments.scratch), recipe)
    order = torch.randperm(len(own) + len(other), generator=torch.Generator().manual_seed(recipe.seed))
    text = torch.cat([own, other])[order]
    began = time.monotonic()

    def on_step(step: int, divergence: float) -> None:
        _say(f"step {step} of {recipe.num_steps}: {divergence:.4f} nats per token, {time.monotonic() - began:.0f} s")
        if step % 25 == 0:
            save_split(to_split(student, text[:_NUM_FINISHING], recipe), arguments.out)

    distill(student, dense, text, recipe, on_step)
    save_split(to_split(student, text[:_NUM_FINISHING], recipe), arguments.out)
    _say(f"wrote {arguments.out}")


def sequences(dense: DenseModel, texts: list[Path], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Token ids of the calibration text and of the other texts, [sequences, positions]."""
    own, *others = (path.read_text(encoding="utf-8") for path in (HERE / "calibration.txt", *texts))
    packed = [
        pack_documents(dense.tokenizer, text.split(DOCUMENT_BREAK), recipe.num_positions) for text in (own, *others)
    ]
    return packed[0], torch.cat([packed[0][:0], *packed[1:]])


def _calibrated(dense: DenseModel, text: Tensor, recipe: Recipe, scratch: Path | None) -> list[LayerSplit]:
    kept = scratch / "calibrated.pt" if scratch else None
    if kept and kept.exists():
        return [LayerSplit(**fields) for fields in torch.load(kept)]
    splits = calibrate(dense, text[: recipe.num_sequences], recipe, lambda layer: _say(f"layer {layer} is split"))
    if kept:
        fields = [{name: getattr(split, name) for name in LayerSplit.__slots__} for split in splits]
        torch.save(fields, kept)
    return splits


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
