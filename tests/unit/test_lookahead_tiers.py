"""Lookahead over two tiers: the disk looks further ahead, and only what is in RAM is copied on to the device."""

from collections.abc import Collection, Sequence

import pytest
import torch
from torch import nn

from offload_moe.errors import ConfigError
from offload_moe.experts.lookahead import DISK_DEPTH, Lookahead
from offload_moe.experts.probe import NativeRouter, PlainRouter, RouterProbe
from offload_moe.native.kernels import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import LRU
from offload_moe.residency.prefetch import PrefetchGovernor
from offload_moe.residency.residency import Residency

NUM_LAYERS, NUM_EXPERTS, HIDDEN = 6, 8, 4


class FakeTier:
    """Takes note of what is prefetched; only even experts are here."""

    keys = ExpertKeys([NUM_EXPERTS] * NUM_LAYERS)

    def __init__(self, num_slots: int = 64) -> None:
        self.prefetched: dict[int, list[int]] = {}
        self.residency = Residency(SlotTable(self.keys.total, num_slots), LRU())

    def prefetch(self, layer: int, experts: Sequence[int], keep: Collection[int] = ()) -> int:
        self.prefetched[layer] = list(experts)
        return len(experts)

    def is_known(self, layer: int, expert: int) -> bool:
        return expert % 2 == 0

    def resident(self, layer: int, experts: Sequence[int]) -> list[int]:
        return [expert for expert in experts if expert % 2 == 0]


class Router(nn.Module):
    """Wants experts 2 and 3, whatever it is asked."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])


@pytest.fixture
def tiers() -> tuple[FakeTier, FakeTier]:
    return FakeTier(), FakeTier()


@pytest.fixture
def lookahead(tiers: tuple[FakeTier, FakeTier]) -> Lookahead:
    device, ram = tiers
    probes = [RouterProbe(nn.Identity(), Router()) for _ in range(NUM_LAYERS)]
    return Lookahead(probes, device, PrefetchGovernor(), 1, ram)  # type: ignore[arg-type]


def pass_layer(lookahead: Lookahead, layer: int, num_tokens: int = 1) -> None:
    hidden = torch.ones(num_tokens, HIDDEN)
    probe = lookahead._probes[layer]
    assert probe is not None
    probe.norm(hidden)  # the model's own call, which leaves the residual behind
    answers = [ids.tolist()[0] for ids in lookahead.route_ahead(layer, hidden, 2)]
    lookahead.after_acquire(layer, num_tokens, [0, 1], 2, answers)


def test_the_disk_looks_further_than_the_device(lookahead: Lookahead, tiers: tuple[FakeTier, FakeTier]) -> None:
    device, ram = tiers
    pass_layer(lookahead, 0)
    assert ram.prefetched == {layer: [2, 3] for layer in range(1, 2 + DISK_DEPTH)}
    assert device.prefetched == {1: [2]}  # 3 is still on disk


def test_a_chunk_brings_the_next_layer(lookahead: Lookahead, tiers: tuple[FakeTier, FakeTier]) -> None:
    device, ram = tiers
    pass_layer(lookahead, 0, num_tokens=64)
    assert ram.prefetched == {1: list(range(NUM_EXPERTS))}
    assert device.prefetched == {1: [0, 2, 4, 6]}


def test_a_short_chunk_brings_nothing(lookahead: Lookahead, tiers: tuple[FakeTier, FakeTier]) -> None:
    pass_layer(lookahead, 0, num_tokens=2)
    assert not tiers[0].prefetched
    assert not tiers[1].prefetched


class Chooser(nn.Module):
    """Chooses three experts by itself, however many are wanted."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1, 2, 3]])


def test_answers_of_another_size_are_not_taken(tiers: tuple[FakeTier, FakeTier]) -> None:
    device, ram = tiers
    probes = [RouterProbe(nn.Identity(), Chooser()) for _ in range(NUM_LAYERS)]
    lookahead = Lookahead(probes, device, PrefetchGovernor(), 1, ram)  # type: ignore[arg-type]
    pass_layer(lookahead, 0)
    assert not ram.prefetched


class OnePlusNorm(nn.Module):
    """Gemma's norms multiply by one plus their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.9, 3, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (64,), 1 + self.weight)


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight).softmax(-1)


@pytest.mark.parametrize(
    ("norm", "dtype", "kind"),
    [
        (nn.RMSNorm(64), torch.float32, NativeRouter),
        (nn.RMSNorm(64, eps=1e-2), torch.float32, NativeRouter),
        (nn.RMSNorm(64), torch.bfloat16, PlainRouter),
        (OnePlusNorm(), torch.float32, None),
    ],
)
@torch.no_grad()
def test_the_shortest_way_to_the_same_experts_is_taken(norm: nn.Module, dtype: torch.dtype, kind: type | None) -> None:
    probe = RouterProbe(norm.to(dtype), Softmax().to(dtype))
    residuals = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for residual in (residuals[:1], residuals):
        assert torch.equal(probe.route(residual, 4), probe._router(norm(residual)).topk(4).indices)
    assert isinstance(probe._routes[4], PlainRouter | NativeRouter) == (kind is not None)
    assert kind is None or isinstance(probe._routes[4], kind)


@torch.no_grad()
def test_a_router_of_another_width_is_no_business_of_the_kernels() -> None:
    """They would write as many numbers as the norm has."""
    residual = torch.randn(1, 64)
    for router in (nn.Linear(32, 16), nn.Linear(64, 16).to(torch.bfloat16)):
        with pytest.raises(ConfigError, match="router"):
            NativeRouter(nn.RMSNorm(64), router, 4)
    with pytest.raises(TypeError, match="fp32"):
        NativeRouter(nn.RMSNorm(64), nn.Linear(64, 16), 4)(residual.bfloat16())
