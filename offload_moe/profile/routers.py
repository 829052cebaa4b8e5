"""The router in front of an experts module, and its distribution over the experts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.checkpoint.overlooked import ROUTER_NAMES

SUM_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    module: nn.Module
    num_experts: int
    is_sigmoid: bool

    def scores(self, out: Any, num_tokens: int) -> Tensor | None:
        """``[T, E]`` in the module's output; None if it has no scores."""
        shape = (num_tokens, self.num_experts)
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor) and part.is_floating_point() and part.shape[-1] == self.num_experts:
                if part.shape == shape:
                    return part
                if part.numel() == num_tokens * self.num_experts:
                    return part.reshape(shape)
        return None

    def probabilities(self, scores: Tensor) -> Tensor:
        """``[T, E]`` of the module's output -> fp32 with rows that sum to one.

        Sigmoid scores are divided by their sum, as in DeepSeek-V3's balance loss (arXiv 2412.19437, section 2.1.2).
        """
        scores = scores.detach().float()
        if bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() < SUM_TOLERANCE).all()):
            return scores
        if not self.is_sigmoid:
            return scores.softmax(-1)
        scores = scores.sigmoid()
        return scores / scores.sum(-1, keepdim=True)


def find_router(hf: nn.Module, block_name: str, num_experts: int) -> Router | None:
    """The router among the children of an MoE block, if the family has one."""
    block = hf.get_submodule(block_name)
    module = next((child for name, child in block.named_children() if name in ROUTER_NAMES), None)
    if module is None:
        return None
    config = getattr(hf, "config", None)
    scoring = getattr(config, "scoring_func", None) or getattr(config, "score_function", None)
    is_sigmoid = scoring == "sigmoid" or hasattr(module, "e_score_correction_bias")
    return Router(module=module, num_experts=num_experts, is_sigmoid=is_sigmoid)


def pad_experts(probabilities: Tensor, num_experts: int) -> Tensor:
    """``[T, e] -> [T, E]``: the missing experts of a smaller layer have probability zero."""
    return torch.nn.functional.pad(probabilities, (0, num_experts - probabilities.shape[-1]))
