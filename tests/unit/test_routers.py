"""The router in front of experts, found once for all who need it."""

from typing import Any

import pytest
import torch
from support.checkpoints import tiny_config
from torch import Tensor, nn

from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.skeleton import auto_class
from offload_moe.families.routers import declared_routers, find_router
from offload_moe.profile.routers import find_router as find_profiled


def tiny(family: str) -> Any:
    torch.manual_seed(3)
    model = auto_class(config := tiny_config(family)).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.normal_(0, 0.3)
    return model


@pytest.mark.parametrize(
    ("family", "correction"),
    [
        ("mixtral", None),
        ("deepseek_v3", None),
        ("hunyuan_v1_moe", None),
        ("ernie4_5_moe", None),
        ("minimax_m2", "e_score_correction_bias"),
        ("hy_v3", "e_score_correction_bias"),
    ],
)
@torch.no_grad()
def test_a_declared_router_chooses_as_its_module(family: str, correction: str | None) -> None:
    """Also one whose module takes a correction that its block holds."""
    model = tiny(family)
    block_name = find_experts(model)[-1].block_name
    router = find_router(model, block_name)
    assert router is not None
    assert router.routes_alone(torch.ones(1, model.config.hidden_size))
    assert router.spec == declared_routers(model)[router.module]
    rows = torch.randn(20, model.config.hidden_size)
    arguments = [getattr(model.get_submodule(block_name), correction)] if correction else []
    *_, ids = router.module(rows, *arguments)
    chosen = router.choose(rows)
    assert torch.equal(chosen.sort(-1).values, ids.sort(-1).values)
    assert len(chosen.unique()) > 2
    assert router.choose(rows.bfloat16()).shape == chosen.shape


@pytest.mark.parametrize(
    ("family", "is_sigmoid"), [("qwen3_moe", False), ("minimax_m2", True), ("solar_open", True), ("axk1", True)]
)
def test_profiles_know_the_kind_of_scores(family: str, is_sigmoid: bool) -> None:
    model = tiny(family)
    block_name = find_experts(model)[-1].block_name
    found = find_profiled(model, block_name, 4)
    assert found is not None
    assert found.is_sigmoid == is_sigmoid


class WithBias(nn.Module):
    def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
        return hidden_states + bias


class WithLateBias(nn.Module):
    """What it misses shows in its forward only."""

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None) -> Tensor:
        return hidden_states + bias


class Alone(nn.Module):
    def forward(self, hidden_states: Tensor, scale: float = 1.0, **_: Any) -> Tensor:
        return hidden_states * scale


def test_a_router_that_is_not_declared_and_takes_more_cannot_be_asked() -> None:
    for module, routes_alone in (
        (WithBias(), False),
        (WithLateBias(), False),
        (Alone(), True),
        (nn.Linear(2, 2), True),
    ):
        model = nn.ModuleDict({"layer": nn.ModuleDict({"mlp": nn.ModuleDict({"gate": module})})})
        found = find_router(model, "layer.mlp")
        assert found is not None
        assert found.spec is None
        assert found.routes_alone(torch.ones(1, 2)) == routes_alone


def test_a_block_without_a_router() -> None:
    model = nn.ModuleDict({"layer": nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.Identity()})})})
    assert find_router(model, "layer.mlp") is None
