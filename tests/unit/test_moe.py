"""Routing groups, recognized activations, and the choice of arithmetic."""

import pytest
import torch
from support.offload import offload
from support.pressure import bound_of
from support.tiny_models import FAMILIES, tiny_model

from offload_moe.checkpoint.experts import find_experts
from offload_moe.experts.activation import Activation, recognize_activation
from offload_moe.experts.arithmetic import choose_arithmetic, notice_without_kernel
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.experts.native import NativeArithmetic
from offload_moe.experts.per_expert import ReferenceArithmetic
from offload_moe.experts.routing import group_by_expert
from offload_moe.quant import get_codec


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_groups_are_those_of_eager(num_tokens: int) -> None:
    top_k_index = torch.rand(num_tokens, 6).topk(3).indices
    routing = group_by_expert(top_k_index, num_experts=6)
    mask = torch.nn.functional.one_hot(top_k_index, 6).permute(2, 1, 0)
    assert routing.experts == mask.sum((-1, -2)).nonzero().flatten().tolist()
    for index, expert in enumerate(routing.experts):
        places, tokens = torch.where(mask[expert])
        assert routing.tokens[routing.pairs(index)] == tokens.tolist()
        assert routing.places[routing.pairs(index)] == places.tolist()


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_sentinels_of_masked_tokens_are_dropped(num_tokens: int) -> None:
    routing = group_by_expert(torch.tensor([[4, 1], [4, 4]])[:num_tokens], num_experts=4)
    assert routing.experts == [1]
    assert (routing.tokens, routing.places, routing.offsets) == ([0], [1], [0, 1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_activations_of_real_families_are_recognized(family: str) -> None:
    layer = find_experts(tiny_model(family))[0]
    found = recognize_activation(layer.module, is_interleaved=layer.shape.is_interleaved)
    assert found is not None
    assert found.name == ("gpt_oss" if family == "gpt_oss" else "silu")


@pytest.mark.parametrize(
    ("function", "name"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2")]
)
def test_activations_are_recognized_by_what_they_do(function: str, name: str) -> None:
    from transformers.activations import ACT2FN

    module = find_experts(tiny_model("mixtral"))[0].module
    module.act_fn = ACT2FN[function]
    assert recognize_activation(module, is_interleaved=False) == Activation(name=name)


def test_an_unknown_activation_is_left_to_torch() -> None:
    layer = find_experts(tiny_model("mixtral"))[0]
    layer.module.act_fn = torch.nn.Softplus()
    assert recognize_activation(layer.module, is_interleaved=False) is None
    chosen = choose_arithmetic(layer.module, layer.shape, get_codec("nf4"), torch.device("cpu"))
    assert isinstance(chosen, ReferenceArithmetic)
    notice = notice_without_kernel(layer.module, layer.shape, get_codec("nf4"))
    assert "torch computes this model's experts on the CPU" in notice
    assert notice.endswith("no kernel has their activation.")


def test_the_choice_of_arithmetic() -> None:
    layer = find_experts(tiny_model("qwen3_moe"))[0]

    def choose(codec: str, device: str, **options: object) -> object:
        return choose_arithmetic(layer.module, layer.shape, get_codec(codec), torch.device(device), **options)

    assert isinstance(choose("bf16", "cpu"), ReferenceArithmetic)
    assert isinstance(choose("bf16", "cpu", dtype=torch.bfloat16), NativeArithmetic)
    assert isinstance(choose("bf16", "cpu", dtype=torch.bfloat16, is_exact=True), ReferenceArithmetic)
    assert isinstance(choose("nf4", "cuda"), DeviceArithmetic)
    assert isinstance(choose("nf4", "cpu"), NativeArithmetic)


def test_a_familys_scale_holds_for_a_single_token_too() -> None:
    """One resident token takes a way of its own through the kernel, which once forgot the scale."""

    def run(scale: float) -> torch.Tensor:
        attached, _ = offload(
            tiny_model("qwen3_moe"),
            "nf4",
            24,
            arithmetic=lambda module, shape, codec: NativeArithmetic(
                shape, codec, Activation(name="silu"), has_gate=True, pair_scale=scale
            ),
        )
        bound = bound_of(attached)[0]
        routed = torch.ones(1, 64), torch.tensor([[0, 2, 5]]), torch.full((1, 3), 0.3)
        bound(*routed)
        return bound(*routed)

    assert torch.allclose(run(0.5), 0.5 * run(1.0), rtol=1e-5)
    assert run(1.0).any()
