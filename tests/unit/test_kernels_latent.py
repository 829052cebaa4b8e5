"""One call for a decode step of latent attention, against torch in fp64 with expanded keys and values."""

from typing import Any

import pytest
import torch
from support.kernels import SETS, decoded, make_linear
from torch import Tensor
from torch.nn import functional

from offload_moe.errors import ConfigError
from offload_moe.native import kernels

HIDDEN, CAPACITY = 96, 40
SCALING = 0.2
pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")


def norm(length: int) -> kernels.HeadNorm:
    return kernels.HeadNorm(weight=torch.rand(length) + 0.5, epsilon=1e-3)


def normed(x: Tensor, by: kernels.HeadNorm) -> Tensor:
    return functional.rms_norm(x, x.shape, by.weight.double(), by.epsilon)


class Case:
    """Projections, norms and a cache of random numbers."""

    def __init__(
        self,
        heads: int = 6,
        rank: int = 48,
        rotated: int = 16,
        unrotated: int = 24,
        value: int = 20,
        length: int = 11,
        query_rank: int = 40,
        rotation: str = "pairs",
        has_bias: bool = False,
    ) -> None:
        torch.manual_seed(heads + length)
        self.heads, self.rank, self.rotated, self.unrotated = heads, rank, rotated, unrotated
        self.value, self.length, self.rotation = value, length, rotation
        sizes = [(query_rank, HIDDEN)] if query_rank else []
        sizes += [(heads * (unrotated + rotated), query_rank or HIDDEN)]
        self.query = [make_linear("int8", *size, has_bias=has_bias) for size in sizes]
        self.compress = make_linear("fp32", rank + rotated, HIDDEN, has_bias=has_bias)
        self.expand = make_linear("bf16", heads * (unrotated + value), rank)
        self.output = make_linear("int8", HIDDEN, heads * value, has_bias=has_bias)
        self.per_head = decoded(self.expand).view(heads, unrotated + value, rank)
        keys = self.per_head[:, :unrotated].transpose(1, 2).reshape(-1, unrotated)
        self.inner = kernels.Linear.of_numbers(keys.bfloat16().contiguous())
        self.query_norm = norm(query_rank) if query_rank else None
        self.latent_norm = norm(rank)
        self.x = torch.randn(1, 1, HIDDEN)
        angles = torch.rand(rotated // 2) * 3
        self.angles = angles.double()
        self.cos, self.signed_sin = torch.cat([angles.cos()] * 2), torch.cat((-angles.sin(), angles.sin()))
        self.cache = [torch.randn(1, 1, CAPACITY, rank), torch.randn(1, 1, CAPACITY, rotated)]

    def kernel(self, **changes: Any) -> kernels.LatentKernel:
        settings: dict[str, Any] = {
            **{name: getattr(self, name) for name in ("query", "compress", "inner", "expand", "output")},
            **{name: getattr(self, name) for name in ("query_norm", "latent_norm", "rotation")},
            "rotated_dims": self.rotated,
            "scaling": SCALING,
        }
        return kernels.LatentKernel(**settings | changes)

    def step(self, cache_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        latents, turned = (part.to(cache_dtype, copy=True) for part in self.cache)
        out = torch.full_like(self.x, torch.nan)
        self.kernel(cache_dtype=cache_dtype).step(
            self.x, self.cos, self.signed_sin, [(latents, turned, self.length)], out
        )
        return out, latents, turned

    def expected(self, cache: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the cache afterwards. cache: that of a step, to attend to."""
        x = self.x.flatten().double()
        query = product(self.query[0], x)
        if self.query_norm is not None:
            query = product(self.query[1], normed(query, self.query_norm))
        unrotated, turned = query.view(self.heads, -1).split([self.unrotated, self.rotated], 1)
        latent, key = product(self.compress, x).split([self.rank, self.rotated])
        latents, keys = (part.double() for part in self.cache)
        latents[0, 0, self.length], keys[0, 0, self.length] = normed(latent, self.latent_norm), self.turn(key)
        seen, turned_keys = (part[0, 0, : self.length + 1].double() for part in cache or (latents, keys))
        expanded = torch.einsum("nxr,sr->nsx", self.per_head, seen)
        scores = torch.einsum("nk,nsk->ns", unrotated, expanded[..., : self.unrotated])
        scores = (scores + self.turn(turned) @ turned_keys.T) * SCALING
        mixed = torch.einsum("ns,nsv->nv", scores.softmax(1), expanded[..., self.unrotated :])
        return product(self.output, mixed.flatten()).view(1, 1, -1), latents, keys

    def turn(self, part: Tensor) -> Tensor:
        cos, sin = self.angles.cos(), self.angles.sin()
        first, second = part.chunk(2, -1) if self.rotation == "halves" else (part[..., 0::2], part[..., 1::2])
        pairs = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(pairs, -1).flatten(-2) if self.rotation == "pairs" else torch.cat(pairs, -1)


def product(linear: kernels.Linear, x: Tensor) -> Tensor:
    return decoded(linear) @ x + (0 if linear.bias is None else linear.bias)


CASES: list[dict[str, Any]] = [
    {},
    {"rotation": "halves"},
    {"rotation": "pairs_to_halves", "has_bias": True},
    {"query_rank": 0},
    {"heads": 1, "length": 0},
    {"heads": 13, "length": 38, "rank": 128, "value": 64, "unrotated": 64},
]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_a_step_is_latent_attention(settings: dict[str, Any], name: str) -> None:
    kernels.select_instruction_set(name)
    made, results = Case(**settings), []
    for threads in (1, 3):
        kernels.set_threads(threads)
        results.append(made.step())
    for got, expected in zip(results[0], made.expected(), strict=True):
        assert (got - expected).norm() <= 3e-6 * expected.norm()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_latents_are_rounded_to_bf16_once(settings: dict[str, Any], name: str) -> None:
    kernels.select_instruction_set(name)
    made = Case(**settings)
    out, *cache = made.step(torch.bfloat16)
    expected, *unrounded = made.expected(tuple(cache))
    assert (out - expected).norm() <= 3e-6 * expected.norm()
    for got, exact in zip(cache, unrounded, strict=True):
        errors = (got[:, :, made.length].double() - exact[:, :, made.length]).abs() / exact[:, :, made.length].abs()
        assert 2**-13 < errors.max() <= 2**-8


def test_nothing_beyond_the_token_is_written() -> None:
    made = Case()
    _, *after = made.step()
    for before, part in zip(made.cache, after, strict=True):
        assert torch.equal(before[:, :, : made.length], part[:, :, : made.length])
        assert torch.equal(before[:, :, made.length + 1 :], part[:, :, made.length + 1 :])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rotated_dims": 8}, "48 with 8 rotated"),
        ({"output": "int8 matrix of other features"}, "projection"),
        ({"inner": "int8"}, "codecs"),
        ({"query_norm": None}, "A norm of the query"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], named: str) -> None:
    made = Case()
    if "output" in changes:
        changes = {"output": make_linear("int8", HIDDEN, made.heads * 10)}
    if "inner" in changes:
        changes = {"inner": make_linear("int8", made.heads * made.rank, made.unrotated)}
    with pytest.raises(ConfigError, match=named):
        made.kernel(**changes)
