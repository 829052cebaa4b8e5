"""The demo model's building blocks, on small random tensors."""

import itertools

import pytest
import torch

from scripts.make_demo.assign import assign_balanced
from scripts.make_demo.calibrate import refit_down
from scripts.make_demo.router import finish_router, fit_router, top_k_mask


def total(value: torch.Tensor, groups: torch.Tensor) -> float:
    return float(value.gather(1, groups[:, None]).sum())


def test_assignment_fills_every_group_and_is_near_the_optimum() -> None:
    value = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    groups = assign_balanced(value, torch.tensor([2, 2, 2]))
    assert torch.bincount(groups, minlength=3).tolist() == [2, 2, 2]
    best = max(total(value, torch.tensor(p)) for p in set(itertools.permutations([0, 0, 1, 1, 2, 2])))
    assert total(value, groups) >= 0.98 * best


def test_assignment_improves_its_start_and_keeps_capacities() -> None:
    value = torch.rand(40, 4, generator=torch.Generator().manual_seed(5))
    capacities = torch.tensor([5, 5, 10, 20])
    start = torch.repeat_interleave(torch.arange(4), capacities)
    groups = assign_balanced(value, capacities, start=start)
    assert torch.equal(torch.bincount(groups), capacities)
    assert total(value, groups) > 1.2 * total(value, start)
    assert torch.equal(start, torch.repeat_interleave(torch.arange(4), capacities)), "the start is not changed"


def test_router_finds_experts_that_are_linear_in_the_input() -> None:
    generator = torch.Generator().manual_seed(1)
    normed = torch.randn(600, 12, generator=generator)
    energy = (normed @ torch.randn(12, 8, generator=generator) + 12).clamp(min=0).square()
    router = fit_router(normed[:500], energy[:500], ridge=1e-4)
    agreement = (top_k_mask(normed[500:] @ router.T, 3) * top_k_mask(energy[500:], 3)).sum() / 300
    assert agreement > 0.9


def test_finished_router_keeps_the_order_and_is_flat() -> None:
    generator = torch.Generator().manual_seed(2)
    normed = torch.randn(400, 16, generator=generator)
    normed[:, 0] += 4
    router = torch.randn(8, 16, generator=generator)
    finished = finish_router(router, normed, 4, ridge=1e-6)
    assert torch.equal(top_k_mask(normed @ router.T, 4), top_k_mask((normed @ finished.T).double(), 4))
    chosen = (normed @ finished.T).softmax(dim=1).topk(4).values
    assert (chosen / chosen.sum(dim=1, keepdim=True) - 0.25).abs().max() < 2e-3


def test_bf16_chooses_what_fp64_chooses_after_finishing() -> None:
    generator = torch.Generator().manual_seed(4)
    normed = torch.randn(4000, 32, generator=generator).bfloat16()
    normed[:, 0] = 6
    router = torch.randn(16, 32, generator=generator)
    router[:, 0] = 4  # what all rows share says nothing about the order, yet takes bits

    def agreement(rows: torch.Tensor) -> float:
        rows = rows.bfloat16()
        exact = top_k_mask(normed.double() @ rows.double().T, 4)
        rounded = top_k_mask(normed @ rows.T, 4).double()
        return float((exact == rounded).all(dim=1).float().mean())

    finished = agreement(finish_router(router, normed.float(), 4, ridge=1e-6))
    assert finished > 0.99
    assert agreement(router) < finished - 0.02


def test_refit_makes_up_for_neurons_that_are_off() -> None:
    generator = torch.Generator().manual_seed(6)
    common = torch.randn(500, 4, generator=generator)
    neurons = common @ torch.randn(4, 10, generator=generator) + 0.1 * torch.randn(500, 10, generator=generator)
    down = torch.randn(3, 10, generator=generator)
    active = neurons.clone()
    active[:, 6:] = 0
    new_down = refit_down(active, neurons - active, down, torch.ones(500, 1), ridge=1e-4)

    def lost(weight: torch.Tensor) -> float:
        return float((active @ weight.T - neurons @ down.T).square().mean())

    assert lost(new_down) < 0.1 * lost(down)


def test_refit_keeps_a_down_proj_that_is_already_right() -> None:
    neurons = torch.randn(50, 6, generator=torch.Generator().manual_seed(7))
    down = torch.randn(3, 6, generator=torch.Generator().manual_seed(8))
    refitted = refit_down(neurons, torch.zeros_like(neurons), down, torch.ones(50, 1), ridge=0.01)
    torch.testing.assert_close(refitted, down)


@pytest.mark.parametrize("top_k", [1, 5])
def test_top_k_mask_has_top_k_ones(top_k: int) -> None:
    scores = torch.randn(7, 5, generator=torch.Generator().manual_seed(9))
    assert top_k_mask(scores, top_k).sum(dim=1).tolist() == [float(top_k)] * 7
