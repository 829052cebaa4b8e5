"""Splitting a dense model layer by layer, each on the inputs that the layers already split give it.

Shapes: N tokens, H hidden, I intermediate, E experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from offload_moe.demo.cluster import expert_energy, group_neurons
from offload_moe.demo.dense import DenseModel
from offload_moe.demo.forward import DenseForward
from offload_moe.demo.recipe import Recipe
from offload_moe.demo.router import finish_router, fit_router, solve_ridge, top_k_mask
from offload_moe.demo.write import LayerSplit


def calibrate(dense: DenseModel, ids: Tensor, recipe: Recipe) -> Iterator[LayerSplit]:
    """Split one layer after another; `ids` int64 [sequences, positions] is the calibration text."""
    forward = DenseForward(dense, ids.shape[1])
    generator = torch.Generator().manual_seed(recipe.seed)
    hidden = forward.embed(ids)
    for layer in range(dense.config["num_hidden_layers"]):
        hidden = forward.attend(layer, hidden)
        flat = hidden.flatten(0, 1)
        normed = forward.feed_forward_input(layer, flat)
        neurons = forward.activations(layer, normed)
        # The next norm divides by the residual's size, so an error counts relative to it.
        weight = 1.0 / flat.square().mean(dim=1, keepdim=True)
        split, output = _split_layer(normed, neurons, forward.weight(layer, "mlp.down_proj"), weight, recipe, generator)
        hidden = hidden + output.view_as(hidden)
        yield split


def _split_layer(
    normed: Tensor, neurons: Tensor, down: Tensor, weight: Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[LayerSplit, Tensor]:
    """One layer's experts and what they put out for the calibration tokens, [N, H]."""
    weight = weight / weight.mean()
    energy = neurons.square() * weight * down.square().sum(dim=0)
    sample = torch.randperm(len(normed), generator=generator)[: recipe.num_cluster_tokens]
    groups = group_neurons(normed[sample], energy[sample], recipe, generator)
    num_experts = recipe.num_experts
    router = fit_router(normed, expert_energy(energy, groups, num_experts), recipe.router_ridge)
    router = finish_router(router, normed, recipe.top_k, recipe.router_ridge)
    mask = torch.nn.functional.pad(top_k_mask(normed @ router.T, recipe.top_k), (0, 1), value=1.0)
    active = neurons * mask[:, groups]
    new_down = refit_down(active, neurons @ down.T, down, weight, recipe.down_ridge)
    routed = torch.stack([(groups == expert).nonzero().flatten() for expert in range(num_experts)])
    shared = (groups == num_experts).nonzero().flatten()
    return LayerSplit(shared=shared, routed=routed, router=router, down=new_down), active @ new_down.T


def refit_down(active: Tensor, target: Tensor, down: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The `down_proj` [H, I] near `down` with which the active neurons [N, I] best give the dense output [N, H].

    Weighted least squares with a ridge towards `down`; `weight` [N, 1] says how much a token counts.
    """
    weighted = active * weight
    moment = weighted.T @ (target - active @ down.T)
    return down + solve_ridge(weighted.T @ active, moment, ridge).T
