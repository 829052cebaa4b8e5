"""Whole tiny models of a family: from a checkpoint on disk through `load` to logits, beside transformers' eager."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from offload_moe import load
from offload_moe.checkpoint.skeleton import auto_class
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import cache_from, with_cache
from support.checkpoints import write_checkpoint
from support.products import products_of_operands_alone

PROMPT = torch.tensor([[5, 9, 31, 4, 22, 8, 17, 40, 11], [3, 3, 27, 6, 50, 14, 9, 9, 33]])
NUM_DECODED = 3
DECORATED = re.compile(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", re.MULTILINE)
MODELS = Path(transformers.__file__).parent / "models"


def eager_model(folder: Path) -> Any:
    """The oracle, in fp32."""
    config = AutoConfig.from_pretrained(folder)
    kind = auto_class(config)
    return kind.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@contextmanager
def both(folder: Path, family: str) -> Iterator[tuple[Model, Any]]:
    """A family's random model, offloaded without a loss and eager."""
    write_checkpoint(folder / "checkpoint", family)
    with load(folder / "checkpoint", codec="bf16") as model:
        yield model, eager_model(folder / "checkpoint")


@torch.inference_mode()
@products_of_operands_alone()
def prompt_and_decode(hf: Any, prompt: Tensor = PROMPT) -> Tensor:
    """Logits of a prompt and of a few decode steps with the cache, all places of the sequence below each other."""
    if hf.config.is_encoder_decoder:
        start = torch.full((len(prompt), 1), hf.config.decoder_start_token_id or 0)
        encoded = hf.get_encoder()(input_ids=prompt)
        encoded.router_logits = None  # what the models ask for, though their encoders do not give it unasked
        out = hf(encoder_outputs=encoded, decoder_input_ids=torch.cat([start, prompt[:, :3]], dim=1))
    else:
        out = hf(input_ids=prompt, use_cache=True)
    logits = [out.logits]
    for _ in range(NUM_DECODED):
        token = out.logits[:, -1:].argmax(-1)
        if hf.config.is_encoder_decoder:
            inputs = {"decoder_input_ids": token, "encoder_outputs": encoded}
        else:
            inputs = {"input_ids": token, "use_cache": True}
        out = hf(**inputs, **with_cache(cache_from(out)))
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def spoil_one_record(model: Model) -> None:
    """Overwrite one expert that was used, where it lies in memory."""
    hierarchy = model.engine.hierarchy
    slot = hierarchy.ram.residency.find(max(hierarchy.ram.residency.resident_keys()))
    assert slot is not None
    hierarchy.record_of(slot).zero_()


def decorated_classes() -> list[tuple[str, str]]:
    """Module and name of every experts class in the registry of the installed transformers; nothing is imported."""
    return [
        ("transformers.models." + ".".join(path.relative_to(MODELS).with_suffix("").parts), name)
        for path in sorted(MODELS.rglob("modeling_*.py"))
        for name in DECORATED.findall(path.read_text(encoding="utf-8"))
    ]


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "moe_hidden_size": 32,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 3,
}


class Holder(nn.Module):
    """Any experts module as a model of one layer."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def tiny_experts(module_name: str, class_name: str) -> nn.Module:
    """An experts module of a decorated class with random weights, from whichever of its family's configs suits it."""
    kind = getattr(importlib.import_module(module_name), class_name)
    reasons = []
    for config_class in _config_classes(module_name.rpartition(".")[0]):
        try:
            config = config_class()
            for name, size in SIZES.items():
                current = getattr(config, name, None)
                setattr(config, name, [size] * len(current) if isinstance(current, list) else size)
            module = kind(config)
            total = sum(parameter.numel() for parameter in module.parameters())
            if not 0 < total < 1 << 20:
                raise ValueError(f"{total} weights")
        except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
            reasons.append(f"{config_class.__name__}: {error}")
            continue
        config._experts_implementation = "eager"
        for parameter in module.parameters():
            parameter.data = (torch.randn(parameter.shape) * 0.3).bfloat16().float()
        return module
    raise AssertionError(f"no config suits {class_name}: {reasons}")


def _config_classes(folder: str) -> list[type[Any]]:
    """Text configs first: others have fields of the same names."""
    found: list[type[Any]] = []
    for path in sorted((MODELS / folder.rpartition(".")[2]).glob("configuration_*.py")):
        module = importlib.import_module(f"{folder}.{path.stem}")
        found += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return sorted(found, key=lambda config: "Text" not in config.__name__)
