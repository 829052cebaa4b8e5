"""Norms and attention in vectors of 16 lanes: every set gives the definition's bits, for any number of threads."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_moe.native import kernels
from tests.support import vector_arithmetic
from tests.support.kernels import PANEL_SETS, make_linear
from tests.support.one_arithmetic import Reference

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

HIDDEN, CAPACITY = 64, 1400
DTYPES = (torch.bfloat16, torch.float32)


def in_panels(linear: kernels.Linear) -> kernels.Linear:
    record = linear.record.clone()
    kernels.PanelOrder(linear.codec, linear.shape, linear.layout).to_panels(record)
    return replace(linear, record=record, in_panels=True)


class Attention:
    """A layer's attention, and a cache of random keys and values."""

    def __init__(
        self, heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype, *, has_norms: bool
    ) -> None:
        generator = torch.Generator().manual_seed(heads * dim + length)
        torch.manual_seed(dim)
        sizes = [(heads * dim, HIDDEN), (kv_heads * dim, HIDDEN), (kv_heads * dim, HIDDEN), (HIDDEN, heads * dim)]
        self.linears = [make_linear("int8", *size) for size in sizes]
        self.dim, self.length, self.dtype = dim, length, dtype
        norm = kernels.HeadNorm(weight=torch.rand(dim, generator=generator) + 0.5, epsilon=1e-5)
        self.norms = (norm, norm) if has_norms else (None, None)
        self.sinks = torch.randn(heads, generator=generator) if has_norms else None
        self.rotated = dim // 2 if has_norms else 0
        self.x = torch.randn(HIDDEN, generator=generator)
        self.turn = torch.rand(dim, generator=generator), torch.rand(dim, generator=generator)
        shape = (1, kv_heads, CAPACITY, dim)
        self.cache = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        self.settings: dict[str, Any] = {}

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        kernel = kernels.AttentionKernel(
            [in_panels(linear) for linear in self.linears],
            head_dim=self.dim,
            rotated_dims=self.rotated,
            scaling=0.3,
            norms=self.norms,
            sinks=self.sinks,
            cache_dtype=self.dtype,
            **self.settings,
        )
        keys, values = (part.clone() for part in self.cache)
        out = torch.full_like(self.x, torch.nan)
        kernel.step(self.x, *self.turn, [(keys, values, self.length)], out)
        return out, keys, values


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy().view(np.int32)


@pytest.mark.parametrize("length", [0, 17, 529])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_attention_is_the_definition(dtype: torch.dtype, length: int) -> None:
    made = Attention(2, 1, 16, length, dtype, has_norms=False)
    kernels.select_instruction_set("portable")
    out, keys, values = made.step()
    x = made.x.numpy()
    query, key, value = (Reference("int8", each.shape, each.layout, each.record).times(x) for each in made.linears[:3])
    for part, new in ((keys, key), (values, value)):
        assert np.array_equal(bits(part[0, 0, length]), bits(torch.from_numpy(new).to(dtype)))
    seen = [part[0, 0, : length + 1].float().numpy() for part in (keys, values)]
    mixed = [vector_arithmetic.attention(head, *seen, 0.3) for head in query.reshape(2, 16)]
    last = made.linears[3]
    expected = Reference("int8", last.shape, last.layout, last.record).times(np.concatenate(mixed))
    assert np.array_equal(bits(out), expected.view(np.int32))


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("length", [3, 4, 530])
def test_a_query_is_turned_normed_and_scaled_as_defined(length: int, instruction_set: str) -> None:
    made = Attention(2, 1, 16, length, torch.float32, has_norms=True)
    made.settings = {"rotation": "pairs", "is_normed_rotated": True, "query_scale": (5.0, 0.3)}
    kernels.select_instruction_set(instruction_set)
    out, keys, values = made.step()
    x, weight, (cos, sin) = made.x.numpy(), made.norms[0].weight.numpy(), (part.numpy() for part in made.turn)
    query, key, _ = (Reference("int8", each.shape, each.layout, each.record).times(x) for each in made.linears[:3])
    turned = [vector_arithmetic.turn_pairs(head, cos[:8], sin[:8]) for head in (*query.reshape(2, 16), key)]
    *queries, key = (vector_arithmetic.rms_norm(head, weight, 1e-5) for head in turned)
    assert np.array_equal(bits(keys[0, 0, length]), key.view(np.int32))
    scale = vector_arithmetic.query_scale(length, 5, 0.3)
    assert (scale == 1) == (length == 3)
    assert np.isclose(scale, 1 + 0.3 * np.log1p((length + 1) // 5), rtol=3e-7)
    seen = [part[0, 0, : length + 1].numpy() for part in (keys, values)]
    heads = zip(queries, made.sinks.tolist(), strict=True)
    mixed = [vector_arithmetic.attention(head * scale, *seen, 0.3, sink) for head, sink in heads]
    last = made.linears[3]
    expected = Reference("int8", last.shape, last.layout, last.record).times(np.concatenate(mixed))
    assert np.array_equal(bits(out), expected.view(np.int32))


def test_a_sink_takes_part_in_the_sum_alone() -> None:
    generator = np.random.default_rng(1)
    q, keys, values = (generator.standard_normal(shape).astype(np.float32) for shape in (16, (5, 16), (5, 16)))
    scores = np.append(keys @ q * np.float32(0.3), 2.0)
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    got = vector_arithmetic.attention(q, keys, values, 0.3, sink=2.0)
    assert np.allclose(got, shares[:5] @ values, atol=1e-6)


@pytest.mark.parametrize("instruction_set", [name for name in PANEL_SETS if name != "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "length"),
    [(4, 4, 16, 0), (6, 2, 48, 5), (14, 2, 128, 200), (8, 1, 80, 511), (3, 3, 64, 512), (18, 1, 32, 1300)],
)
def test_every_set_and_number_of_threads_gives_the_same_bits(
    instruction_set: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, length: int
) -> None:
    made = Attention(heads, kv_heads, dim, length, dtype, has_norms=True)
    kernels.set_threads(1)
    kernels.select_instruction_set("portable")
    expected = made.step()
    assert all(part[:, :, : length + 1].isfinite().all() for part in expected[1:])
    assert expected[0].isfinite().all()
    kernels.select_instruction_set(instruction_set)
    try:
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(made.step(), expected, strict=True))
    finally:
        kernels.set_threads(1)


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("length", [7, 64, 100])
def test_a_norm_is_the_definition(instruction_set: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    weight, x = torch.rand(length, generator=generator) + 0.5, torch.randn(length, generator=generator) * 30
    out = torch.empty(length)
    kernels.select_instruction_set(instruction_set)
    kernels.NormKernel(weight, 1e-3).step(x, out)
    assert np.array_equal(bits(out), vector_arithmetic.rms_norm(x.numpy(), weight.numpy(), 1e-3).view(np.int32))


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("length", [7, 64, 100])
def test_a_layer_norm_is_the_definition(instruction_set: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    weight, bias, x = (torch.randn(length, generator=generator) for _ in range(3))
    x = x * 30 + 7
    out = torch.empty(length)
    kernels.select_instruction_set(instruction_set)
    kernels.NormKernel(weight, 1e-3, bias).step(x, out)
    expected = vector_arithmetic.layer_norm(x.numpy(), weight.numpy(), bias.numpy(), 1e-3)
    assert np.array_equal(bits(out), expected.view(np.int32))
    assert torch.allclose(out, torch.nn.functional.layer_norm(x, [length], weight, bias, 1e-3), atol=1e-5)
    kernels.NormKernel(weight, 1e-3, bias).step(x, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_a_sparse_mixer_is_the_definition(instruction_set: str) -> None:
    torch.manual_seed(4)
    linear = make_linear("bf16", 21, 40)
    kernels.select_instruction_set(instruction_set)
    router = kernels.RouterKernel(linear, top_k=3, is_of_chosen=False, jitter=0.3)
    for _ in range(2):
        logits, weights, ids = torch.empty(21), torch.empty(3), torch.empty(3, dtype=torch.int64)
        router.step(torch.randn(40), logits, weights, ids)
        assert ids.tolist() == sorted(range(21), key=lambda expert: -logits[expert])[:3]
        expected = np.array(vector_arithmetic.mix(list(logits.numpy()), ids.tolist(), 0.3))
        assert np.array_equal(bits(weights), expected.view(np.int32))
        assert (weights < 1).any()


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("columns", [16, 100])
@pytest.mark.parametrize("codec", ["bf16", "fp32"])
@pytest.mark.parametrize("is_of_chosen", [True, False])
def test_a_router_is_the_definition(is_of_chosen: bool, codec: str, columns: int, instruction_set: str) -> None:
    torch.manual_seed(columns)
    linear, x = make_linear(codec, 21, columns, has_bias=True), torch.randn(columns)
    logits, weights, ids = torch.empty(21), torch.empty(5), torch.empty(5, dtype=torch.int64)
    kernels.select_instruction_set(instruction_set)
    kernels.RouterKernel(linear, top_k=5, is_of_chosen=is_of_chosen).step(x, logits, weights, ids)
    rows = linear.record.float().numpy()
    expected = np.array([vector_arithmetic.dot(row, x.numpy(), 32) for row in rows]) + linear.bias.numpy()
    order = sorted(range(21), key=lambda expert: -expected[expert])[:5]
    shares = np.array(vector_arithmetic.softmax(list(expected[order] if is_of_chosen else expected)))
    assert ids.tolist() == order
    assert np.array_equal(bits(logits), expected.view(np.int32))
    assert np.array_equal(bits(weights), (shares if is_of_chosen else shares[order]).view(np.int32))


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("is_of_chosen", [True, False])
def test_a_router_of_sigmoids_is_the_definition(is_of_chosen: bool, instruction_set: str) -> None:
    torch.manual_seed(3)
    linear, correction = make_linear("fp32", 21, 40), torch.rand(21)
    logits, weights, ids = torch.empty(3, 21), torch.empty(3, 9), torch.empty(3, 9, dtype=torch.int64)
    settings = {"is_sigmoid": True, "correction": correction, "scale": 2.3}
    kernels.select_instruction_set(instruction_set)
    router = kernels.RouterKernel(linear, top_k=9, is_of_chosen=is_of_chosen, **settings)
    router.step(torch.randn(3, 40), logits, weights, ids)
    for row in range(3):
        scores = [vector_arithmetic.sigmoid(logit) for logit in logits[row].numpy()]
        order = sorted(range(21), key=lambda expert: -(scores[expert] + correction.numpy()[expert]))[:9]
        chosen, total = [scores[expert] for expert in order], np.float32(0)
        for each in chosen:
            total = total + each
        shares = [each / (total + np.float32(1e-20)) for each in chosen] if is_of_chosen else chosen
        assert ids[row].tolist() == order
        assert np.array_equal(bits(weights[row]), (np.array(shares) * np.float32(2.3)).view(np.int32))


@pytest.mark.parametrize("instruction_set", [name for name in PANEL_SETS if name != "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_numbers_have_the_same_bits_for_any_number_of_tokens(instruction_set: str, dtype: torch.dtype) -> None:
    for rows, columns in ((37, 100), (64, 192), (3, 8)):
        generator = torch.Generator().manual_seed(columns)
        linear = kernels.Linear.of_numbers(torch.randn(rows, columns, generator=generator).to(dtype))
        x = torch.randn(11, columns, generator=generator)
        results = []
        for name in ("portable", instruction_set):
            kernels.select_instruction_set(name)
            kernel = kernels.LinearKernel(linear.codec, [linear.shape], [linear.layout])
            for num_tokens in (1, 2, 3, 4, 5, 8, 11):
                out = torch.empty(num_tokens, rows)
                kernel.forward(x[:num_tokens], [linear.record.view(torch.uint8)], [out])
                results.append(out)
        assert all(np.array_equal(bits(out), bits(results[6][: len(out)])) for out in results)
        assert (results[6] - x @ linear.record.float().T).abs().max() < 1e-4


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_a_key_that_is_no_number_reaches_the_result(instruction_set: str) -> None:
    made = Attention(4, 2, 32, 700, torch.bfloat16, has_norms=False)
    kernels.select_instruction_set(instruction_set)
    assert made.step()[0].isfinite().all()
    made.cache[0][0, 1, 40, 3] = torch.nan
    assert made.step()[0].isnan().all()


def test_bits_do_not_depend_on_the_callers_treatment_of_subnormal_numbers() -> None:
    torch.manual_seed(1)
    linear, tiny = make_linear("fp32", 9, 40), torch.randn(40) * 1e-39
    x, bias = torch.randn(40), torch.full((40,), 1e-41)
    norms = [kernels.NormKernel(torch.full((40,), 1e-40), 1e-3, *biases) for biases in ((), (bias,))]
    router = kernels.RouterKernel(linear, top_k=3, is_of_chosen=True, scale=1e-40)
    tables = [torch.nn.Embedding.from_pretrained(torch.randn(3, 40).to(dtype) * 1e-10) for dtype in DTYPES]
    pairs, ids = torch.randn(4, 40) * 1e-39, torch.tensor([[2, 0]])

    def results() -> list[Tensor]:
        normed, logits, shares = torch.empty(2, 40), torch.empty(9), torch.empty(3)
        added, rounded = torch.empty(1, 40), torch.empty(1, 40, dtype=torch.bfloat16)
        for norm, out in zip(norms, normed, strict=True):
            norm.step(x, out)
        router.step(tiny, logits, shares, torch.empty(3, dtype=torch.int64))
        kernels.add_rows(pairs, added)
        kernels.add_rows(pairs, rounded)
        embedded = [kernels.EmbeddingKernel(table, 1e-30).rows(ids) for table in tables]
        return [normed, logits, shares, added, rounded, *(each for each in embedded if each is not None)]

    expected = results()
    assert len(expected) == 7
    assert all(part.view(torch.int32).any() and (part.abs() < 1.2e-38).all() for part in expected)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = results()
    finally:
        torch.set_flush_denormal(False)
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))
