"""Which neurons are shared, and which fire together and become an expert.

Each neuron contributes its activation times its column of `down_proj`; the squared norm of that is its energy. With
experts switched off, the energy that is lost measures the damage. Sharing and clustering maximize the energy that
survives: route, then give every neuron to the group that is switched on when the neuron matters, and repeat.

Shapes: N tokens, I intermediate, H hidden, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.make_demo.assign import assign_balanced
from scripts.make_demo.recipe import Recipe
from scripts.make_demo.router import add_ridge, fit_router, top_k_mask


def group_neurons(normed: Tensor, energy: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """The group of each neuron, int64 [I]: an expert's number, or E for the shared expert.

    `normed` [N, H] is the router's input, `energy` [N, I] each neuron's energy.
    """
    num_experts = recipe.num_experts
    expert_size = (energy.shape[1] - recipe.num_shared) // num_experts
    capacities = torch.tensor([expert_size] * num_experts + [recipe.num_shared])
    groups = _first_groups(normed, energy, recipe, generator)
    for _ in range(recipe.num_routing_rounds):
        router = fit_router(normed, expert_energy(energy, groups, num_experts), recipe.router_ridge)
        mask = F.pad(top_k_mask(normed @ router.T, recipe.top_k), (0, 1), value=1.0)
        regrouped = assign_balanced(energy.T @ mask, capacities, start=groups)
        if torch.equal(regrouped, groups):
            break
        groups = regrouped
    return groups


def expert_energy(energy: Tensor, groups: Tensor, num_experts: int) -> Tensor:
    """Energy of each routed expert: [N, I] to [N, E]."""
    return energy @ F.one_hot(groups, num_experts + 1).to(energy.dtype)[:, :num_experts]


def _first_groups(normed: Tensor, energy: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Shared: the neurons with the largest mean contribution. Experts: balanced spherical k-means of the others."""
    order = energy.sqrt().mean(dim=0).argsort(descending=True, stable=True)
    groups = torch.full((energy.shape[1],), recipe.num_experts)
    rest = order[recipe.num_shared :]
    profiles = F.normalize(_predictable(normed, energy[:, rest].sqrt(), recipe.router_ridge), dim=1)
    capacities = torch.full((recipe.num_experts,), len(rest) // recipe.num_experts)
    centres = profiles[torch.randperm(len(rest), generator=generator)[: recipe.num_experts]]
    for _ in range(recipe.num_kmeans_rounds):
        clusters = assign_balanced(profiles @ centres.T, capacities)
        members = F.one_hot(clusters, recipe.num_experts).to(profiles.dtype)
        centres = F.normalize(members.T @ profiles, dim=1)
    groups[rest] = clusters
    return groups


def _predictable(normed: Tensor, contribution: Tensor, ridge: float) -> Tensor:
    """The part of each neuron's contribution norm that is linear in the hidden state, as coordinates [neurons, H].

    A router sees nothing else, so neurons are alike when these are: inner products of the coordinates are those of the
    ridge predictions.
    """
    factor = torch.linalg.cholesky(add_ridge(normed.T @ normed, ridge))
    moment = normed.T @ (contribution - contribution.mean(dim=0))
    return torch.linalg.solve_triangular(factor, moment, upper=False).T
