"""Native kernels on rows, with fp32 activations, against fp64 on decoded weights: every set, codec and batch size."""

import os

import pytest
import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native import kernels
from offload_moe.quant import CODECS, ExpertShape, Matrix, get_codec
from tests.support.kernels import SETS, Experts, make_experts, reference, relative_error, route

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

EXACT_ERROR = 1e-6
QUANTIZED = [name for name in ("nf4", "int8", "mxfp4") if name in CODECS]


def run(experts: Experts, x: Tensor) -> Tensor:
    kernel = kernels.ExpertKernel(experts.codec, experts.shape, experts.layout, activation="silu")
    out = torch.full(x.shape, 9.0)
    kernel.forward(x, experts.records, *route(len(x), len(experts.records)), out)
    return out


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("codec", [*QUANTIZED, "bf16"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (200, 97)])
def test_layer_matches_fp64(instruction_set: str, codec: str, hidden: int, intermediate: int) -> None:
    experts = make_experts(codec, hidden, intermediate)
    kernels.select_instruction_set(instruction_set)
    for num_tokens in (1, 2, 3, 5, 8, 9, 33):
        x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(num_tokens))
        expected = reference(experts, x, route(num_tokens, 4))
        assert expected.norm() > 0.1
        assert relative_error(run(experts, x), expected) < EXACT_ERROR


def test_bits_depend_neither_on_threads_nor_on_the_batch() -> None:
    experts = make_experts("nf4", 320, 192, count=2)
    x = torch.randn(200, 320, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        results.append(run(experts, x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = run(experts, x[:1].contiguous())  # both experts take every token, with other weights
    kernel = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu")
    batch = torch.empty(200, 320)
    weights = route(1, 2)[2]
    pairs = [token for _ in range(2) for token in range(200)]
    kernel.forward(x, experts.records, [0, 200, 400], pairs, [w for w in weights for _ in range(200)], batch)
    assert torch.equal(batch[:1], alone)


def test_waves_add_up_to_the_same_bits() -> None:
    experts = make_experts("nf4", 128, 64)
    x = torch.randn(6, 128)
    offsets, token_ids, weights = route(6, 4)
    kernel = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu")
    out = torch.empty(6, 128)
    for wave in (slice(0, 1), slice(1, 4)):
        first, last = offsets[wave.start], offsets[wave.stop]
        local = [offset - first for offset in offsets[wave.start : wave.stop + 1]]
        kernel.forward(
            x, experts.records[wave], local, token_ids[first:last], weights[first:last], out, accumulate=wave.start > 0
        )
    assert torch.equal(out, run(experts, x))


def test_swapped_nibbles_are_noticed() -> None:
    experts = make_experts("nf4", 128, 64)
    for record in experts.records:
        for matrix in experts.shape.matrices:
            codes = experts.layout.view(record, f"{matrix.name}.codes")
            codes.copy_((codes << 4) | (codes >> 4))
    x = torch.randn(2, 128)
    assert relative_error(run(experts, x), reference(experts, x, route(2, 4))) > 0.1


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "gpt_oss"])
def test_activations(activation: str) -> None:
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda g: torch.relu(g).square(),
    }
    experts = make_experts("int8", 64, 64, count=1)
    x = torch.randn(1, 64) * 20
    parts = experts.decoded[0]
    gate, up = (parts["gate_up_proj"] @ x[0].double() + parts["gate_up_proj_bias"]).chunk(2)
    if activation == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        hidden = functions[activation](gate) * up
    kernel = kernels.ExpertKernel("int8", experts.shape, experts.layout, activation=activation)
    out = torch.empty(1, 64)
    kernel.forward(x, experts.records, [0, 1], [0], [1.0], out)
    assert relative_error(out[0], parts["down_proj"] @ hidden + parts["down_proj_bias"]) < EXACT_ERROR


def test_a_nan_reaches_the_result() -> None:
    experts = make_experts("nf4", 128, 64)
    x = torch.randn(2, 128)
    x[1, 5] = torch.nan
    out = run(experts, x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_bf16_in_and_out() -> None:
    experts = make_experts("nf4", 128, 64)
    x = torch.randn(3, 128).bfloat16()
    kernel = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu")
    out = torch.empty(3, 128, dtype=torch.bfloat16)
    kernel.forward(x, [r.data_ptr() for r in experts.records], *route(3, 4), out)
    assert torch.equal(out, run(experts, x.float()).bfloat16())


def test_no_pairs_give_zeros() -> None:
    experts = make_experts("nf4", 128, 64, count=1)
    kernel = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu")
    out = torch.ones(2, 128)
    kernel.forward(torch.randn(2, 128), [], [0], [], [], out)
    assert not out.any()


def test_pairs_out_of_range_are_refused() -> None:
    experts = make_experts("nf4", 128, 64, count=1)
    kernel = kernels.ExpertKernel("nf4", experts.shape, experts.layout, activation="silu")
    with pytest.raises(ConfigError, match="out of range"):
        kernel.forward(torch.randn(2, 128), experts.records, [0, 1], [2], [1.0], torch.empty(2, 128))
    unfit = [([0], [0], [1.0]), ([0, 1, 1], [0], [1.0]), ([0, 1], [0], []), ([0, 1], [], [1.0])]
    for offsets, tokens, weights in unfit:
        with pytest.raises(ConfigError, match="do not fit"):  # native code would read beyond them
            kernel.forward(torch.randn(2, 128), experts.records, offsets, tokens, weights, torch.empty(2, 128))


@pytest.mark.parametrize("codec", QUANTIZED)
def test_several_linears_in_one_call(codec: str) -> None:
    shapes = [
        ExpertShape(
            matrices=(Matrix(name="weight", out_features=rows, in_features=150),),
            biases=(("bias", rows),) if rows == 70 else (),
        )
        for rows in (70, 5, 129)
    ]
    coder = get_codec(codec)
    records = [
        coder.encode(shape, {name: torch.randn(dims) * 0.1 for name, dims in shape.module_shapes().items()})
        for shape in shapes
    ]
    kernel = kernels.LinearKernel(codec, shapes, [coder.layout(shape) for shape in shapes])
    x = torch.randn(9, 150)
    outs = [torch.empty(9, shape.matrices[0].out_features) for shape in shapes]
    kernel.forward(x, records, outs)
    for shape, record, out in zip(shapes, records, outs, strict=True):
        parts = {name: value.double() for name, value in coder.decode(shape, record, torch.float32).items()}
        assert relative_error(out, x.double() @ parts["weight"].T + parts.get("bias", 0.0)) < EXACT_ERROR


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same() -> None:
    experts = make_experts("nf4", 128, 64)
    x = torch.randn(3, 128)
    kernels.set_threads(3)
    expected = run(experts, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run(experts, x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(run(experts, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_gets_the_bits_of_many(dtype: torch.dtype) -> None:
    experts = make_experts("nf4", 128, 64)
    kernel = kernels.ExpertKernel(experts.codec, experts.shape, experts.layout, activation="silu")
    x, weights = torch.randn(1, 128).to(dtype), [0.5, 0.25, 0.125, 0.0625]
    expected, got = torch.empty_like(x), torch.empty_like(x)
    kernel.forward(x, experts.records, [0, 1, 2, 3, 4], [0] * 4, weights, expected)
    kernel.forward_token(x, [record.data_ptr() for record in experts.records], weights, got)
    assert expected.abs().max() > 0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_in_waves_gets_the_bits_of_one_call(dtype: torch.dtype) -> None:
    """Rows are set, whatever was there before, and the others left alone; 96 columns are a block and a half."""
    experts = make_experts("nf4", 96, 64)
    kernel = kernels.ExpertKernel(experts.codec, experts.shape, experts.layout, activation="silu")
    x, weights = torch.randn(1, 96).to(dtype), [0.5, 0.25, 0.125, 0.0625]
    addresses = [record.data_ptr() for record in experts.records]
    pairs, expected, got = torch.full((5, 96), torch.nan), torch.empty_like(x), torch.empty_like(x)
    kernel.forward_token(x, addresses, weights, expected)
    for rows in ([2], [0, 3], [1]):
        kernel.forward_token(x, [addresses[row] for row in rows], [weights[row] for row in rows], pairs, rows)
        assert torch.isfinite(pairs[rows]).all()
    assert pairs[4].isnan().all()
    kernels.add_rows(pairs[:4], got)
    assert torch.equal(got, expected)
