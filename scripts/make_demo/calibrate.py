"""Splitting a dense model layer by layer, each on the inputs that the layers already split give it.

Shapes: N tokens, H hidden, I intermediate, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_moe.demo.dense import DenseModel
from scripts.make_demo.cluster import expert_energy, group_neurons
from scripts.make_demo.corpus import vocabulary_ids
from scripts.make_demo.forward import DenseForward
from scripts.make_demo.layer_split import LayerSplit
from scripts.make_demo.recipe import Recipe
from scripts.make_demo.router import finish_router, fit_router, solve_ridge, top_k_mask


def calibrate(dense: DenseModel, text: Tensor, recipe: Recipe, on_layer: Callable[[int], None]) -> list[LayerSplit]:
    """Split every layer but the first dense ones; `text` int64 [sequences, positions] is the calibration text's tokens.

    `on_layer` is told how many layers are finished, dense ones included.
    """
    splits: list[LayerSplit] = []
    with torch.inference_mode(), _fast_matmul():
        forward = DenseForward(dense, text.shape[1])
        generator = torch.Generator().manual_seed(recipe.seed)
        words = vocabulary_ids(dense.config["vocab_size"], recipe.num_vocabulary, text.shape[1], generator)
        trust = torch.cat([torch.ones(text.numel(), 1), torch.full((words.numel(), 1), recipe.vocabulary_weight)])
        hidden = forward.embed(torch.cat([text, words]))
        for layer in range(dense.config["num_hidden_layers"]):
            hidden = forward.attend(layer, hidden)
            normed = forward.feed_forward_input(layer, hidden).flatten(0, 1)
            neurons = forward.activations(layer, normed)
            down = forward.weight(layer, "mlp.down_proj")
            output = neurons @ down.T
            if layer >= recipe.num_dense_layers:
                # The next norm divides by the residual's size, so an error counts relative to it.
                weight = trust / (hidden.flatten(0, 1) + output).square().mean(dim=1, keepdim=True)
                split, output = _split_layer(normed, neurons, down, weight / weight.mean(), recipe, generator)
                splits.append(split)
            hidden = hidden + output.view_as(hidden)
            on_layer(layer + 1)
    return splits


@contextmanager
def _fast_matmul() -> Iterator[None]:
    """Let torch choose its faster fp32 kernels; on some processors they are twice as fast, on some they round more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _split_layer(
    normed: Tensor, neurons: Tensor, down: Tensor, weight: Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[LayerSplit, Tensor]:
    """One layer's experts and what they put out for the calibration tokens, [N, H]."""
    energy = neurons.square().mul_(down.square().sum(dim=0)).mul_(weight)
    sample = torch.randperm(len(normed), generator=generator)[: recipe.num_cluster_tokens]
    groups = group_neurons(normed[sample], energy[sample], recipe, generator)
    num_experts = recipe.num_experts
    router = fit_router(normed, expert_energy(energy, groups, num_experts), recipe.router_ridge)
    router = finish_router(router, normed, recipe.top_k, recipe.router_ridge)
    mask = F.pad(top_k_mask(normed @ router.T, recipe.top_k), (0, 1), value=1.0)
    active = neurons * mask[:, groups]
    new_down = refit_down(active, neurons - active, down, weight, recipe.down_ridge)
    routed = torch.stack([(groups == expert).nonzero().flatten() for expert in range(num_experts)])
    shared = (groups == num_experts).nonzero().flatten()
    return LayerSplit(shared=shared, routed=routed, router=router, down=new_down), active @ new_down.T


def refit_down(active: Tensor, inactive: Tensor, down: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The `down_proj` [H, I] near `down` with which the active neurons make up for the inactive ones, both [N, I].

    Weighted least squares with a ridge towards `down`; `weight` [N, 1] says how much a token counts.
    """
    root = weight.sqrt()
    scaled = active * root
    moment = scaled.T @ ((inactive @ down.T).mul_(root))
    return down + solve_ridge(scaled.T @ scaled, moment, ridge).T
