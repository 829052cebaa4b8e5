"""Gated MLPs over three records: the numbers of fp64, and the bits of an expert with the same matrices."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offload_moe.errors import ConfigError
from offload_moe.native import kernels
from offload_moe.quant import ExpertShape, Matrix, get_codec
from tests.support.kernels import PANEL_SETS, decoded, make_linear, relative_error

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

HIDDEN, INTERMEDIATE = 72, 104


def make_mlp(codecs: tuple[str, str], intermediate: int = INTERMEDIATE) -> list[kernels.Linear]:
    torch.manual_seed(0)
    shapes = ((intermediate, HIDDEN), (intermediate, HIDDEN), (HIDDEN, intermediate))
    return [make_linear(codec, *shape) for codec, shape in zip((codecs[0], *codecs), shapes, strict=True)]


def in_panels(linear: kernels.Linear) -> kernels.Linear:
    record = linear.record.clone()
    kernels.PanelOrder(linear.codec, linear.shape, linear.layout).to_panels(record)
    return replace(linear, record=record, in_panels=True)


def run(linears: list[kernels.Linear], x: Tensor, activation: str = "silu") -> Tensor:
    out = torch.full_like(x, torch.nan)
    kernels.MlpKernel(*linears, activation=activation).forward(x, out)
    return out


@pytest.mark.parametrize("codecs", [("nf4", "nf4"), ("int8", "nf4"), ("mxfp4", "mxfp4"), ("bf16", "bf16")])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_it_matches_fp64(codecs: tuple[str, str], num_tokens: int) -> None:
    linears = make_mlp(codecs)
    x = torch.randn(num_tokens, HIDDEN)
    gate, up, down = map(decoded, linears)
    expected = (functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    assert relative_error(run(linears, x), expected) < 1e-6
    if "bf16" not in codecs:
        assert relative_error(run([in_panels(each) for each in linears], x), expected) < 0.025


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_it_has_the_bits_of_an_expert(instruction_set: str) -> None:
    linears, codec = make_mlp(("int8", "int8")), get_codec("int8")
    first = Matrix(name="gate_up_proj", out_features=2 * INTERMEDIATE, in_features=HIDDEN)
    shape = ExpertShape(matrices=(first, Matrix(name="down_proj", out_features=HIDDEN, in_features=INTERMEDIATE)))
    layout = codec.layout(shape)
    record = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for plane in ("codes", "scales"):
        gate, up, down = (linear.layout.view(linear.record, f"weight.{plane}") for linear in linears)
        layout.view(record, f"gate_up_proj.{plane}").copy_(torch.cat([gate, up]))
        layout.view(record, f"down_proj.{plane}").copy_(down)
    kernels.PanelOrder("int8", shape, layout, has_gate=True).to_panels(record)
    expert = kernels.ExpertKernel("int8", shape, layout, activation="gelu", in_panels=True)
    kernels.select_instruction_set(instruction_set)
    for num_tokens in (1, 3, 9):
        x, out = torch.randn(num_tokens, HIDDEN), torch.empty(num_tokens, HIDDEN)
        expert.forward(x, [record], [0, num_tokens], range(num_tokens), [1.0] * num_tokens, out)
        assert torch.equal(run([in_panels(each) for each in linears], x, "gelu"), out)


def test_neither_threads_nor_groups_of_tokens_change_bits() -> None:
    linears = [in_panels(each) for each in make_mlp(("nf4", "nf4"), intermediate=4096)]
    x = torch.randn(400, HIDDEN)  # more than are computed at once
    expected = run(linears, x)
    kernels.set_threads(3)
    assert torch.equal(run(linears, x), expected)
    assert torch.equal(run(linears, x[390:].contiguous()), expected[390:])
    narrow = torch.empty(400, HIDDEN, dtype=torch.bfloat16)
    kernels.MlpKernel(*linears, activation="silu").forward(x, narrow)
    assert torch.equal(narrow, expected.bfloat16())


def test_what_is_no_gated_mlp_is_refused() -> None:
    gate, up, down = make_mlp(("int8", "int8"))
    for wrong in (
        (gate, down, down),
        (gate, up, up),
        (gate, in_panels(up), down),
        (gate, make_mlp(("nf4", "nf4"))[1], down),
    ):
        with pytest.raises(ConfigError):
            kernels.MlpKernel(*wrong, activation="silu")
