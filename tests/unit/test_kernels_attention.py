"""One call for a decode step of attention, against torch in fp64."""

from dataclasses import replace

import pytest
import torch
from support.kernels import PANEL_SETS, SETS, decoded, make_linear
from torch import Tensor
from torch.nn import functional

from offload_moe.errors import ConfigError
from offload_moe.native import kernels

HIDDEN, CAPACITY = 96, 40
pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")


def linear(codec: str, out_features: int, in_features: int, *, has_bias: bool) -> tuple[kernels.Linear, Tensor]:
    """A quantized linear, and its decoded weight in fp64."""
    made = make_linear(codec, out_features, in_features, has_bias=has_bias)
    return made, decoded(made)


def rms_norm(x: Tensor, norm: kernels.HeadNorm) -> Tensor:
    rows = x.view(-1, len(norm.weight))
    return functional.rms_norm(rows, [rows.shape[1]], norm.weight.double(), norm.epsilon).view(x.shape)


class Case:
    """Projections, norms and a cache of random numbers."""

    def __init__(self, codec: str, heads: int, kv_heads: int, dim: int, rotated: int, length: int, norm: str) -> None:
        torch.manual_seed(heads * dim + length)
        self.heads, self.kv_heads, self.dim, self.rotated, self.length = heads, kv_heads, dim, rotated, length
        self.is_gated = norm == "gated"
        sizes = [
            ((1 + self.is_gated) * heads * dim, HIDDEN),
            (kv_heads * dim, HIDDEN),
            (kv_heads * dim, HIDDEN),
            (HIDDEN, heads * dim),
        ]
        pairs = [linear(codec, *size, has_bias=norm in ("head", "gated")) for size in sizes]
        self.linears, self.weights = [p[0] for p in pairs], [p[1] for p in pairs]
        lengths = {"none": [], "head": [dim, dim], "gated": [dim, dim], "all": [heads * dim, kv_heads * dim]}[norm]
        self.norms = [kernels.HeadNorm(weight=torch.rand(n) + 0.5, epsilon=1e-3) for n in lengths] or [None, None]
        self.sinks = torch.randn(heads) if norm == "head" else None
        self.x = torch.randn(1, 1, HIDDEN)
        angles = torch.rand(rotated // 2)
        self.cos = torch.cat([angles.cos()] * 2)
        self.signed_sin = torch.cat((-angles.sin(), angles.sin()))
        self.cache = [torch.randn(1, kv_heads, CAPACITY, dim) for _ in range(2)]

    def kernel(self, cache_dtype: torch.dtype = torch.float32) -> kernels.AttentionKernel:
        return kernels.AttentionKernel(
            self.linears,
            head_dim=self.dim,
            rotated_dims=self.rotated,
            scaling=0.3,
            norms=self.norms,
            sinks=self.sinks,
            cache_dtype=cache_dtype,
            is_gated=self.is_gated,
        )

    def rows(self, x: Tensor) -> Tensor:
        """x ``[T, H]`` of as many sequences, which have all seen the same."""
        rooms = [(*(part.clone() for part in self.cache), self.length) for _ in x]
        cos, signed_sin = (part.expand(len(x), -1).contiguous() for part in (self.cos, self.signed_sin))
        out = torch.full_like(x, torch.nan)
        self.kernel().step(x.contiguous(), cos, signed_sin, rooms, out)
        return out

    def step(self, cache_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (part.to(cache_dtype, copy=True) for part in self.cache)
        out = torch.full_like(self.x, torch.nan)
        self.kernel(cache_dtype).step(self.x, self.cos, self.signed_sin, [(keys, values, self.length)], out)
        return out, keys, values

    def expected(self, cache: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the cache afterwards. cache: that of a step, to attend to."""
        projected, gates = [], torch.tensor(1.0)
        for which in range(3):
            bias = self.linears[which].bias
            states = self.weights[which] @ self.x.flatten().double() + (0 if bias is None else bias)
            if which == 0 and self.is_gated:
                states, gates = states.view(self.heads, 2, self.dim).unbind(1)
            if which < 2 and (norm := self.norms[which]) is not None:
                states = rms_norm(states, norm)
            states = states.view(-1, self.dim)
            projected.append(states if which == 2 else torch.cat((self.turned(states), states[:, self.rotated :]), 1))
        keys, values = (part.double() for part in self.cache)
        keys[0, :, self.length], values[0, :, self.length] = projected[1:]
        group, end = self.heads // self.kv_heads, self.length + 1
        k, v = (part[0, :, :end].double().repeat_interleave(group, 0) for part in cache or (keys, values))
        scores = torch.einsum("nd,nsd->ns", projected[0], k) * 0.3
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks[:, None]), 1)
        mixed = torch.einsum("ns,nsd->nd", scores.softmax(1)[:, :end], v) * (gates.sigmoid() if self.is_gated else 1)
        out = self.weights[3] @ mixed.flatten() + (0 if self.linears[3].bias is None else self.linears[3].bias)
        return out.view(1, 1, -1), keys, values

    def turned(self, states: Tensor) -> Tensor:
        part = states[:, : self.rotated]
        return part * self.cos + part.roll(self.rotated // 2, 1) * self.signed_sin


CASES = [
    ("nf4", 4, 4, 16, 16, 0, "none"),
    ("int8", 6, 2, 32, 16, 7, "head"),
    ("nf4", 4, 2, 80, 80, 33, "all"),
    ("int8", 8, 1, 64, 64, CAPACITY - 1, "none"),
    ("int8", 4, 2, 32, 16, 9, "gated"),
]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_attention(case: tuple[str, int, int, int, int, int, str], name: str) -> None:
    kernels.select_instruction_set(name)
    made = Case(*case)
    results = []
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        results.append(made.step())
    for got, expected in zip(results[0], made.expected(), strict=True):
        assert (got - expected).norm() <= 2e-6 * expected.norm()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_are_rounded_to_bf16_once(case: tuple[str, int, int, int, int, int, str], name: str) -> None:
    kernels.select_instruction_set(name)
    made = Case(*case)
    out, *cache = made.step(torch.bfloat16)
    expected, *unrounded = made.expected(tuple(cache))
    assert (out - expected).norm() <= 2e-6 * expected.norm()
    for got, before, exact in zip(cache, made.cache, unrounded, strict=True):
        assert got.dtype == torch.bfloat16
        new, others = got[:, :, made.length].double(), [t for t in range(CAPACITY) if t != made.length]
        assert torch.equal(got[:, :, others], before[:, :, others].bfloat16())
        errors = (new - exact[:, :, made.length]).abs() / exact[:, :, made.length].abs()
        assert errors.max() <= 2**-8  # half a unit in the last place
        assert errors.max() > 2**-13


def test_gated_heads_have_the_same_bits_in_every_set_and_number_of_rows() -> None:
    """Some rows, and many: each the next token of a sequence of its own."""
    made, found = Case("int8", 4, 2, 32, 16, 9, "gated"), []
    made.linears = [in_panels(each) for each in made.linears]
    x = torch.randn(20, HIDDEN)
    for name in (*PANEL_SETS, "portable"):
        kernels.select_instruction_set(name)
        found += [torch.cat([made.rows(part) for part in x.split(num_rows)]) for num_rows in (1, 3, 20)]
    assert found[0].abs().max() > 0.01
    assert all(torch.equal(each, found[0]) for each in found)


def test_heads_that_fit_no_vector_are_refused() -> None:
    made = Case("int8", 4, 2, 16, 16, 3, "none")
    for settings in ({"head_dim": 8, "rotated_dims": 8}, {"head_dim": 16, "rotated_dims": 32}):
        with pytest.raises(ConfigError):
            kernels.AttentionKernel(made.linears, scaling=1.0, **settings)


@pytest.mark.parametrize("length", [7, 64, 100])
def test_a_norm_of_one_row(length: int) -> None:
    weight, x = torch.rand(length) + 0.5, torch.randn(1, 1, length) * 30
    out = torch.full_like(x, torch.nan)
    kernels.NormKernel(weight, 1e-3).step(x, out)
    expected = functional.rms_norm(x.double(), [length], weight.double(), 1e-3)
    assert torch.allclose(out.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_projections_in_panels_give_what_rows_give(codec: str) -> None:
    case = Case(codec, 6, 2, 32, 32, 7, "head")
    expected = case.step()
    case.linears = [in_panels(each) for each in case.linears]
    for mine, theirs in zip(case.step(), expected, strict=True):
        assert 0 < (mine - theirs).norm() < 0.02 * theirs.norm()  # int8 activations


def in_panels(linear: kernels.Linear) -> kernels.Linear:
    record = linear.record.clone()
    kernels.PanelOrder(linear.codec, linear.shape, linear.layout).to_panels(record)
    return replace(linear, record=record, in_panels=True)
