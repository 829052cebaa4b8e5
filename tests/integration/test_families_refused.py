"""What cannot be bound is refused by name, never run as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_config, write_checkpoint
from torch import nn

from offload_moe import load
from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.skeleton import build_skeleton
from offload_moe.errors import UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")


class StackedRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 32))


class MixtureLayer(nn.Module):
    """Experts that no name gives away: only its router does."""

    def __init__(self) -> None:
        super().__init__()
        self.router = StackedRouter()
        self.first, self.second = nn.Parameter(torch.empty(4, 24, 32)), nn.Parameter(torch.empty(4, 32, 24))


class FakeExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(4, 24, 32))


def model_with(fake: nn.Module, *, layers: range) -> Any:
    model = build_skeleton(tiny_config("mixtral"))
    for layer in layers:
        model.model.layers[layer].mlp = fake
    return model


@pytest.mark.parametrize("fake", [MixtureLayer(), FakeExperts(), nn.ModuleDict({"experts": FakeExperts()})])
@pytest.mark.parametrize("layers", [range(3), range(1, 2)])  # all of them, and one among bound ones
def test_undecorated_experts_are_named(fake: nn.Module, layers: range) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"model\.layers\.{layers[0]}\.mlp"):
        find_experts(model_with(fake, layers=layers))


def test_a_list_of_experts_is_named() -> None:
    fake = nn.ModuleDict({"gate": nn.Linear(32, 4), "experts": nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])})
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts \(ModuleList\)"):
        find_experts(model_with(fake, layers=range(1, 2)))


def test_an_adapter_is_for_its_own_class_only() -> None:
    """A class that borrows the name of one that has an adapter is not taken for it."""
    borrowed = type("DbrxExperts", (FakeExperts,), {})()
    with pytest.raises(UnsupportedModelError, match="DbrxExperts"):
        find_experts(model_with(borrowed, layers=range(3)))


def test_diffusion_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "checkpoint", "diffusion_gemma")
    with pytest.raises(UnsupportedModelError, match="shares its experts with another layer"):
        load(tmp_path / "checkpoint", codec="bf16")


def test_a_model_that_runs_layers_several_times_is_refused() -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    if "inkling2_loop" not in CONFIG_MAPPING:
        pytest.skip("transformers 5.24 is the first to have it")
    for model_type in ("inkling2_loop", "inkling2_loop_text"):
        with pytest.raises(UnsupportedModelError, match=r"through some layers several times, this one 3 times"):
            build_skeleton(AutoConfig.for_model(model_type))


def test_a_model_that_writes_no_text_is_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(UnsupportedModelError, match="no text-generating model"):
        build_skeleton(AutoConfig.for_model("openai_privacy_filter"))
