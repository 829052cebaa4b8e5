"""Training the split model towards the dense one's predictions: Kullback-Leibler divergence, next token by next token.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), at temperature 1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_moe.demo.dense import DenseModel
from scripts.make_demo.forward import DenseForward
from scripts.make_demo.recipe import Recipe
from scripts.make_demo.student import Student

_HEAD_CHUNK = 256  # tokens whose whole-vocabulary scores are in memory at a time
_WARM_UP_STEPS = 10
_LAST_SHARE = 0.02


def distill(
    student: Student, dense: DenseModel, text: Tensor, recipe: Recipe, on_step: Callable[[int, float], None]
) -> None:
    """Train in place; `text` int64 [sequences, positions], read in order, again from the start when it ends.

    `on_step` is told the number of finished steps and the last divergence in nats per token.
    """
    teacher = DenseForward(dense, recipe.num_positions)
    head = dense.tensors.get("lm_head.weight", dense.tensors["model.embed_tokens.weight"])
    optimizer = torch.optim.Adam(student.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.num_steps))
    for step in range(recipe.num_steps):
        first = step * recipe.batch_size
        batch = text[torch.arange(first, first + recipe.batch_size) % len(text)]
        with torch.no_grad():
            wanted = teacher.last_hidden(batch)
        divergence = _backward(student(batch), wanted, head)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, divergence)


def _rate(step: int, num_steps: int) -> float:
    """Up for a few steps, then down along a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * (_LAST_SHARE + (1 - _LAST_SHARE) * cosine)


def _backward(found: Tensor, wanted: Tensor, head: Tensor) -> float:
    """Gradients of the mean divergence, and its value; both [B, T, H], head [vocabulary, H]."""
    leaf = found.detach().flatten(0, 1).requires_grad_()
    total = 0.0
    for ours, theirs in zip(leaf.split(_HEAD_CHUNK), wanted.flatten(0, 1).split(_HEAD_CHUNK), strict=True):
        with torch.no_grad():
            target = F.log_softmax(F.linear(theirs, head), dim=-1)
        scores = F.log_softmax(F.linear(ours, head), dim=-1)
        divergence = F.kl_div(scores, target, log_target=True, reduction="sum") / len(leaf)
        divergence.backward()
        total += float(divergence.detach())
    found.backward(leaf.grad.view_as(found))
    return total
