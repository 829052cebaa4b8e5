"""The device's arithmetic on the CPU, without tiers: against eager experts, in every order of arrival."""

import random
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from support.tiny_models import FAMILIES, tiny_model
from torch import Tensor

from offload_moe.checkpoint.experts import ExpertsModule, find_experts
from offload_moe.experts import device
from offload_moe.experts.contract import ExpertsContract
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.experts.routing import group_by_expert
from offload_moe.quant import CODECS, Codec, get_codec
from offload_moe.residency.lease import Lease, Wave

Inputs = tuple[Tensor, Tensor, Tensor]


def layer_and_records(family: str, codec: Codec, dtype: torch.dtype) -> tuple[ExpertsModule, list[Tensor]]:
    """A layer whose own weights are the decoded ones, and the records they were decoded from."""
    layer = find_experts(tiny_model(family).to(dtype))[0]
    records = []
    for expert in range(layer.num_experts):
        parameters = {name: getattr(layer.module, name).data[expert] for name in layer.shape.module_shapes()}
        records.append(codec.encode(layer.shape, parameters))
        for name, value in codec.decode(layer.shape, records[-1], dtype).items():
            parameters[name].copy_(value)
    return layer, records


def routed(layer: ExpertsModule, num_tokens: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, layer.shape.matrices[0].in_features, generator=generator).to(dtype)
    weights, ids = torch.rand(num_tokens, layer.num_experts, generator=generator).topk(3)
    return hidden, ids, weights


def compute(
    layer: ExpertsModule, codec: Codec, records: list[Tensor], inputs: Inputs, order: random.Random | None = None
) -> Tensor:
    """order: experts arrive shuffled, in waves of random size; None: all at once."""
    hidden, ids, weights = inputs
    routing = group_by_expert(ids, layer.num_experts)
    experts = [(expert, expert) for expert in routing.experts]
    waves: list[Wave] = []
    if order is not None:
        order.shuffle(experts)
        while len(experts) > 1:
            size = order.randrange(1, len(experts))
            waves.append(experts[:size])
            experts = experts[size:]
    waves.append(experts)
    arithmetic = DeviceArithmetic(cast(ExpertsContract, layer.module), layer.shape, codec)
    return arithmetic.forward(hidden, weights, routing, cast(Lease, waves), records.__getitem__)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_lossless_codec_gives_the_bits_of_eager(family: str, num_tokens: int, dtype: torch.dtype) -> None:
    codec = get_codec("bf16")
    layer, records = layer_and_records(family, codec, dtype)
    for seed in range(5):
        inputs = routed(layer, num_tokens, dtype, seed)
        expected = layer.module(*inputs)
        assert expected.abs().max() > 0.1
        assert torch.equal(compute(layer, codec, records, inputs, random.Random(seed)), expected)


@pytest.mark.parametrize("group_pairs", [1, 7, 256])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("codec_name", sorted(CODECS))
def test_no_order_of_arrival_changes_a_bit(
    codec_name: str, num_tokens: int, group_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = get_codec(codec_name)
    layer, records = layer_and_records("gpt_oss", codec, torch.bfloat16)
    inputs = routed(layer, num_tokens, torch.bfloat16)
    expected = compute(layer, codec, records, inputs)
    monkeypatch.setattr(device, "GROUP_PAIRS", group_pairs)
    for seed in range(5):
        assert torch.equal(compute(layer, codec, records, inputs, random.Random(seed)), expected)


@pytest.mark.parametrize("num_tokens", [1, 33])
@pytest.mark.parametrize("codec_name", sorted(CODECS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_codec_follows_eager_on_the_decoded_experts(family: str, codec_name: str, num_tokens: int) -> None:
    codec = get_codec(codec_name)
    layer, records = layer_and_records(family, codec, torch.float32)
    inputs = routed(layer, num_tokens, torch.float32)
    torch.testing.assert_close(compute(layer, codec, records, inputs), layer.module(*inputs), rtol=1e-5, atol=1e-5)


def test_tokens_without_experts_get_zeros() -> None:
    codec = get_codec("bf16")
    layer, records = layer_and_records("mixtral", codec, torch.float32)
    masked = torch.full((1, 2), layer.num_experts)
    hidden = torch.randn(1, 64)
    assert compute(layer, codec, records, (hidden, masked, torch.ones(1, 2))).eq(0).all()


def test_an_expert_chosen_twice_counts_twice() -> None:
    codec = get_codec("bf16")
    layer, records = layer_and_records("mixtral", codec, torch.float32)
    inputs = torch.randn(1, 64), torch.tensor([[3, 1, 3]]), torch.tensor([[0.5, 0.25, 0.125]])
    assert torch.equal(compute(layer, codec, records, inputs), layer.module(*inputs))


@torch.inference_mode(False)
def test_a_model_that_was_not_told_to_infer_is_served_too() -> None:
    codec = get_codec("nf4")
    layer, records = layer_and_records("mixtral", codec, torch.float32)
    hidden, ids, weights = routed(layer, 1, torch.float32)
    expected = compute(layer, codec, records, (hidden, ids, weights))
    assert torch.equal(compute(layer, codec, records, (hidden.requires_grad_(), ids, weights)), expected)
