"""MoE layers over records in panels: the same bits from every set, batch, number of threads and order of arrival."""

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_moe.native import kernels
from tests.support.kernels import PANEL_SETS, Experts, make_experts, reference, relative_error, route
from tests.support.one_arithmetic import expert_of

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

CODECS = ("nf4", "int8", "mxfp4")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gpt_oss", "relu", "relu2", "identity")


def in_panels(experts: Experts) -> list[Tensor]:
    order = kernels.PanelOrder(experts.codec, experts.shape, experts.layout, has_gate=True)
    records = [record.clone() for record in experts.records]
    for record in records:
        order.to_panels(record)
    return records


def run(experts: Experts, records: list[Tensor], x: Tensor, *, activation: str = "silu") -> Tensor:
    kernel = kernels.ExpertKernel(experts.codec, experts.shape, experts.layout, activation=activation, in_panels=True)
    out = torch.full(x.shape, 9.0)
    kernel.forward(x, records, *route(len(x), len(records)), out)
    return out


def rows(num_tokens: int, hidden: int) -> Tensor:
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(num_tokens))


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (200, 97)])
def test_layer_matches_fp64(instruction_set: str, codec: str, hidden: int, intermediate: int) -> None:
    experts = make_experts(codec, hidden, intermediate)
    records = in_panels(experts)
    kernels.select_instruction_set(instruction_set)
    for num_tokens in (1, 2, 3, 8, 9, 33):
        x = rows(num_tokens, hidden)
        expected = reference(experts, x, route(num_tokens, 4))
        assert (
            relative_error(run(experts, records, x), expected) < 0.025
        )  # int8 activations twice and, for nf4, 8-bit levels: 1.6% on these sizes


@pytest.mark.parametrize("codec", CODECS)
def test_bits_are_those_of_the_definition(codec: str) -> None:
    experts = make_experts(codec, 72, 40, count=1)
    x = rows(1, 72)
    kernel = kernels.ExpertKernel(codec, experts.shape, experts.layout, activation="relu2", in_panels=True)
    out = torch.empty(1, 72)
    kernel.forward(x, in_panels(experts), [0, 1], [0], [0.7], out)
    expected = expert_of(experts, 0, x[0].numpy(), lambda g: np.where(g < 0, np.float32(0), g * g)) * np.float32(0.7)
    assert np.array_equal(out[0].numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("instruction_set", [name for name in PANEL_SETS if name != "portable"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_set_gives_the_same_bits(instruction_set: str, activation: str) -> None:
    experts = make_experts("nf4", 192, 160)
    records, x = in_panels(experts), rows(9, 192) * 5
    kernels.select_instruction_set("portable")
    expected = run(experts, records, x, activation=activation)
    assert expected.norm() > 0.1
    kernels.select_instruction_set(instruction_set)
    assert torch.equal(run(experts, records, x, activation=activation), expected)


def test_bits_depend_neither_on_threads_nor_on_the_batch() -> None:
    experts = make_experts("mxfp4", 320, 192, count=2)
    records = in_panels(experts)
    x = rows(200, 320)
    results = []
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        results.append(run(experts, records, x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for count in (1, 2, 5):
        weights = [0.5] * count
        kernel = kernels.ExpertKernel("mxfp4", experts.shape, experts.layout, activation="silu", in_panels=True)
        alone, batch = torch.empty(1, 320), torch.empty(count, 320)
        kernel.forward(x[:1], records[:1], [0, 1], [0], weights[:1], alone)
        kernel.forward(x[:count], records[:1], [0, count], list(range(count)), weights, batch)
        assert torch.equal(batch[:1], alone)


def test_experts_that_arrive_one_by_one_give_the_same_bits() -> None:
    experts = make_experts("nf4", 128, 64)
    records, x = in_panels(experts), rows(1, 128)
    weights = [0.4, 0.3, 0.2, 0.1]
    kernel = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu", in_panels=True)
    whole, parts, out = torch.empty(1, 128), torch.empty(4, 128), torch.empty(1, 128)
    addresses = [record.data_ptr() for record in records]
    kernel.forward_token(x, addresses, weights, whole)
    for index in (2, 0, 3, 1):
        kernel.forward_token(x, [addresses[index]], [weights[index]], parts, [index])
    kernels.add_rows(parts, out)
    assert torch.equal(out, whole)
    waves = torch.empty(1, 128)
    for wave in (slice(0, 1), slice(1, 4)):
        count = wave.stop - wave.start
        kernel.forward(
            *(x, records[wave], list(range(count + 1)), [0] * count, weights[wave], waves),
            accumulate=wave.start > 0,
        )
    assert torch.equal(waves, whole)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_near_torchs(activation: str) -> None:
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    experts = make_experts("int8", 64, 64, count=1, has_bias=False)
    parts = experts.decoded[0]
    x = rows(5, 64) * 8
    gate, up = (x.double() @ parts["gate_up_proj"].T).chunk(2, dim=1)
    expected = (functions[activation](gate) * up) @ parts["down_proj"].T
    kernel = kernels.ExpertKernel("int8", experts.shape, experts.layout, activation=activation, in_panels=True)
    out = torch.empty(5, 64)
    kernel.forward(x, in_panels(experts), [0, 5], list(range(5)), [1.0] * 5, out)
    assert relative_error(out, expected) < 0.025


def test_a_nan_reaches_its_own_token_only() -> None:
    experts = make_experts("nf4", 128, 64)
    x = rows(2, 128)
    x[1, 5] = torch.nan
    out = run(experts, in_panels(experts), x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
