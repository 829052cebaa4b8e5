"""A checkpoint folder as transformers loads it and as this package does."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from offload_moe import load
from offload_moe.checkpoint.skeleton import auto_class
from offload_moe.convert.quantize import quantize

IDS = torch.tensor([[3, 17, 5, 60, 41, 22]])


def expected_logits(folder: Path) -> Tensor:
    """Of transformers' own `from_pretrained`, in fp32."""
    model_class = auto_class(AutoConfig.from_pretrained(folder))
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: Tensor = model(**_inputs(model)).logits
    return logits


def stored_logits(store: Path) -> Tensor:
    with load(store, dtype=torch.float32, exact=True, context=64) as model, torch.no_grad():
        logits: Tensor = model.hf(**_inputs(model.hf)).logits
        return logits.clone()


def converted(folder: Path, store: Path, codec: str = "bf16") -> list[str]:
    """Convert without loss; what the user was told to know."""
    notices: list[str] = []
    quantize(folder, store, codec=codec, on_notice=notices.append)
    return notices


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t.clone() for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def write_single(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put these in the place of whatever weights the folder has."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_config(folder: Path, **changes: object) -> None:
    """Also in the parts of a multimodal config that have such a key."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        part |= {key: value for key, value in changes.items() if part is raw or key in part}
    path.write_text(json.dumps(raw))


def _inputs(model: object) -> dict[str, Tensor]:
    is_two_halves = model.config.is_encoder_decoder  # type: ignore[attr-defined]
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if is_two_halves else {})}
