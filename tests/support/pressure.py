"""Short conversations under eviction pressure: every slot is overwritten as soon as that is allowed."""

import random
import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_moe.experts.attach import BoundExperts, bound_experts
from offload_moe.families.cache_name import cache_from, with_cache
from offload_moe.residency.residency import SlotState
from offload_moe.residency.scheduler import Scheduler
from support.tiny_models import tiny_prompt

draw = random.Random(0)


def generate(model: PreTrainedModel, num_tokens: int = 3, seed: int = 0) -> Tensor:
    """Logits of a prompt, then of decode steps with the cache."""
    ids, mask = (tensor.to(model.device) for tensor in tiny_prompt(2, 7, seed))
    logits = []
    cache = None
    with torch.inference_mode():
        for _ in range(num_tokens):
            out = model(input_ids=ids, attention_mask=mask, **with_cache(cache), use_cache=True)
            cache = cache_from(out)
            logits.append(out.logits)
            ids = out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.cat(logits, dim=1)


def experts_of(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if bound_experts(module) is not None]


def bound_of(model: PreTrainedModel) -> list[BoundExperts]:
    """What is bound to each MoE layer."""
    return [bound for module in model.modules() if (bound := bound_experts(module)) is not None]


def scheduler_of(model: PreTrainedModel) -> Scheduler:
    return bound_of(model)[0].scheduler


def overwrite_what_was_released(model: PreTrainedModel) -> None:
    """After each layer, load other experts into every slot, while the compute of the layer may still be to come."""
    scheduler = scheduler_of(model)
    num_keys = scheduler.keys.total

    def overwrite(*_: object) -> None:
        for key in draw.sample(range(num_keys), scheduler.residency.num_slots):
            layer, expert = scheduler.keys.layer_expert(key)
            scheduler.prefetch(layer, [expert])
        wait_until_quiet(scheduler)

    for module in experts_of(model):
        module.register_forward_hook(overwrite)


def wait_until_quiet(scheduler: Scheduler) -> None:
    """Until nothing is on its way any more."""
    deadline = time.monotonic() + 60
    with scheduler.changed:
        while is_loading(scheduler):
            assert time.monotonic() < deadline
            scheduler.wait(1.0)


def is_loading(scheduler: Scheduler) -> bool:
    residency = scheduler.residency
    return any(residency.state(slot) is SlotState.LOADING for slot in range(residency.num_slots))
