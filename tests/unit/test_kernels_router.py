"""One call for a decode step of a router, in every form that layers declare, against torch in fp64."""

from typing import Any

import pytest
import torch
from support.kernels import SETS, decoded, make_linear
from torch import nn
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from offload_moe.errors import ConfigError
from offload_moe.families.layer_reference import route
from offload_moe.families.layer_spec import RouterSpec
from offload_moe.native import kernels

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("is_of_chosen", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("codec", ["bf16", "fp32"])
def test_a_router_chooses_as_torch_does(codec: str, has_bias: bool, is_of_chosen: bool, name: str) -> None:
    kernels.select_instruction_set(name)
    torch.manual_seed(3)
    made, weight = made_and_decoded(codec, 40, 100, has_bias=has_bias)
    kernel = kernels.RouterKernel(made, top_k=6, is_of_chosen=is_of_chosen)
    for scale in (0.01, 1.0, 30.0):
        x = torch.randn(100) * scale
        logits, weights, ids = torch.empty(40), torch.empty(6), torch.empty(6, dtype=torch.int64)
        kernel.step(x, logits, weights, ids)
        expected = weight @ x.double() + (0 if made.bias is None else made.bias)
        shares = expected.softmax(0)
        assert torch.allclose(logits.double(), expected, rtol=1e-5, atol=1e-5 * scale)
        assert ids.tolist() == expected.topk(6).indices.tolist()
        chosen = shares[ids] / (shares[ids].sum() if is_of_chosen else 1)
        assert torch.allclose(weights.double(), chosen, rtol=1e-4)


def test_a_router_of_equal_or_unusable_logits_still_chooses_distinct_experts() -> None:
    made, _ = made_and_decoded("bf16", 8, 64, has_bias=False)
    kernel = kernels.RouterKernel(made, top_k=3, is_of_chosen=True)
    for x in (torch.zeros(64), torch.full((64,), torch.nan)):
        logits, weights, ids = torch.empty(8), torch.empty(3), torch.empty(3, dtype=torch.int64)
        kernel.step(x, logits, weights, ids)
        assert ids.tolist() == [0, 1, 2]


def made_and_decoded(codec: str, out_features: int, in_features: int, *, has_bias: bool) -> tuple[Any, torch.Tensor]:
    made = make_linear(codec, out_features, in_features, has_bias=has_bias)
    return made, decoded(made)


class Gate(nn.Module):
    """The tensors of a router."""

    def __init__(self, weight: torch.Tensor, correction: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("correction", correction)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("groups", [(1, 1, "max"), (8, 3, "max"), (8, 3, "best two"), (40, 20, "best two")])
@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_every_form_is_what_its_spec_says(
    scoring: Any, is_normalized: bool, is_corrected: bool, groups: tuple[int, int, Any], scale: float
) -> None:
    torch.manual_seed(5)
    made, weight = made_and_decoded("bf16", 40, 100, has_bias=False)
    correction = torch.rand(40) * (0.05 if scoring == "softmax" else 0.5)
    num_groups, num_chosen, score = groups
    spec = RouterSpec(
        path="",
        weight="gate.weight",
        top_k=6,
        scoring=scoring,
        is_normalized=is_normalized,
        correction="gate.correction" if is_corrected else "",
        num_groups=num_groups,
        num_chosen_groups=num_chosen,
        group_score=score,
        scale=scale,
    )
    layer = nn.Module()
    layer.gate = Gate(weight.float(), correction)
    kernel = kernels.RouterKernel(
        made,
        top_k=6,
        is_of_chosen=is_normalized,
        is_sigmoid=scoring == "sigmoid",
        correction=correction if is_corrected else None,
        num_groups=num_groups,
        num_chosen_groups=num_chosen,
        num_best=1 if score == "max" else 2,
        scale=scale,
    )
    chosen = set()
    for _ in range(20):
        x = torch.randn(100)
        logits, weights, ids = torch.empty(40), torch.empty(6), torch.empty(6, dtype=torch.int64)
        kernel.step(x, logits, weights, ids)
        expected_weights, expected_ids = route(layer, spec, x[None])
        assert ids.tolist() == expected_ids[0].tolist()
        assert torch.allclose(weights, expected_weights[0], rtol=1e-4)
        chosen |= set(ids.tolist())
    assert len(chosen) > 20


# Of five experts: usual ones; all below zero; zero, which is divided by; equal ones; far apart; of both signs.
LOGITS = [
    [0.3, 1.0, 0.95, -0.2, 0.9],
    [-2.0, -1.0, -1.1, -1.05, -3.0],
    [0.0, 0.0, -1e-30, -0.5, 1e-30],
    [0.5, 0.5, 0.5, 0.5, 0.5],
    [90.0, -90.0, 88.0, 0.0, -1e4],
    [-0.1, -5.0, 0.2, 0.19, 0.21],
]


@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("logits", LOGITS)
def test_a_sparse_mixer_weighs_as_transformers_does(logits: list[float], jitter: float) -> None:
    made = kernels.Linear.of_numbers(torch.tensor(logits)[:, None])
    kernel = kernels.RouterKernel(made, top_k=2, is_of_chosen=False, jitter=jitter)
    found, weights, ids = torch.empty(5), torch.empty(2), torch.empty(2, dtype=torch.int64)
    kernel.step(torch.ones(1), found, weights, ids)
    assert torch.equal(found, torch.tensor(logits))
    expected_weights, expected_ids = sparsemixer(found[None], jitter, training=False)
    assert ids.tolist() == expected_ids[0].tolist()
    assert torch.allclose(weights, expected_weights[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_k": 0}, "cannot choose 0"),
        ({"top_k": 9, "num_groups": 10, "num_chosen_groups": 2}, "in 2 of 10 groups"),
        ({"num_groups": 7, "num_chosen_groups": 2}, "in 2 of 7 groups"),
    ],
)
def test_a_router_that_cannot_choose_is_refused(settings: dict[str, Any], named: str) -> None:
    made = make_linear("bf16", 40, 64)
    with pytest.raises(ConfigError, match=named):
        kernels.RouterKernel(made, **{"top_k": 6, "is_of_chosen": True, **settings})


def test_too_many_experts_to_score_are_refused() -> None:
    made = make_linear("bf16", 2000, 64)
    kernels.RouterKernel(made, top_k=6, is_of_chosen=True)
    for settings in ({"correction": torch.zeros(2000)}, {"jitter": 0.01}):
        with pytest.raises(ConfigError, match="no more than 1024 experts, not 2000"):
            kernels.RouterKernel(made, top_k=6, is_of_chosen=True, **settings)
