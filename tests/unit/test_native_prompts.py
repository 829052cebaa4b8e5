"""Many rows at once, as prompts have them: the bits that each row has in a decode step of its own."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_moe.native import kernels
from tests.support.kernels import PANEL_SETS, make_linear
from tests.unit.test_vectors import in_panels

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

HIDDEN, HEADS, DIM, RANK, CAPACITY, LENGTHS = 64, 6, 32, 48, 700, (5, 490)
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    kernels.set_threads(request.param)
    yield request.param
    kernels.set_threads(1)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(length: int) -> kernels.HeadNorm:
    return kernels.HeadNorm(weight=numbers(length, seed=length).abs() + 0.5, epsilon=1e-5)


def grouped(kv_heads: int, dtype: torch.dtype) -> kernels.AttentionKernel:
    torch.manual_seed(kv_heads)
    sizes = [(HEADS * DIM, HIDDEN), (kv_heads * DIM, HIDDEN), (kv_heads * DIM, HIDDEN), (HIDDEN, HEADS * DIM)]
    return kernels.AttentionKernel(
        [in_panels(make_linear("int8", *size)) for size in sizes],
        head_dim=DIM,
        rotated_dims=16,
        scaling=0.4,
        norms=(norm(DIM), norm(DIM)),
        sinks=numbers(HEADS, seed=2),
        cache_dtype=dtype,
    )


def latent(dtype: torch.dtype) -> kernels.LatentKernel:
    torch.manual_seed(9)

    def values(*size: int) -> kernels.Linear:
        return kernels.Linear.of_numbers(torch.randn(size) * 0.2)

    return kernels.LatentKernel(
        query=[in_panels(make_linear("int8", 40, HIDDEN)), in_panels(make_linear("int8", HEADS * (24 + 16), 40))],
        compress=in_panels(make_linear("int8", RANK + 16, HIDDEN)),
        inner=values(HEADS * RANK, 24),
        expand=values(HEADS * (24 + 20), RANK),
        output=in_panels(make_linear("int8", HIDDEN, HEADS * 20)),
        query_norm=norm(40),
        latent_norm=norm(RANK),
        rotated_dims=16,
        scaling=0.3,
        rotation="pairs_to_halves",
        cache_dtype=dtype,
    )


Kernel = kernels.AttentionKernel | kernels.LatentKernel


class Sequences:
    """Caches of some sequences, and tokens to come. window: what each token sees of its sequence; None: all."""

    def __init__(
        self, kernel: Kernel, kv_heads: int, window: int | None = None, lengths: Sequence[int] = LENGTHS
    ) -> None:
        self.kernel, self.window = kernel, window
        is_latent, capacity = isinstance(kernel, kernels.LatentKernel), max(CAPACITY, max(lengths) + 64)
        shapes = ((1, 1, capacity, RANK), (1, 1, capacity, 16)) if is_latent else ((1, kv_heads, capacity, DIM),) * 2
        self.caches = [[numbers(*s, seed=n).to(kernel.cache_dtype) for s in shapes] for n in range(len(lengths))]
        self.lengths = [*lengths]

    def rooms(self, which: Sequence[int]) -> list[kernels.Room]:
        """For the next tokens of these sequences, which count afterwards."""
        rooms = []
        for sequence in which:
            length = self.lengths[sequence]
            first = 0 if self.window is None else max(0, length + 1 - self.window)
            keys, values = (part[:, :, first:] for part in self.caches[sequence])
            rooms.append((keys, values, length - first))
            self.lengths[sequence] += 1
        return rooms

    def attend(self, x: Tensor, which: Sequence[int], at_once: int) -> Tensor:
        """``[T, H] -> [T, H]``, so many tokens in each call."""
        cos, sin = numbers(len(x), 16, seed=11), numbers(len(x), 16, seed=12)
        outs = []
        for first in range(0, len(x), at_once):
            part = slice(first, first + at_once)
            out = torch.full_like(x[part], torch.nan)
            self.kernel.step(x[part], cos[part], sin[part], self.rooms(which[part]), out)
            outs.append(out)
        return torch.cat(outs)


ARRANGEMENTS = {
    "one": [1] * 41,  # its tokens cross the end of a section
    "two": [0] * 20 + [1] * 30 + [0] * 3,
    "alone": [0],
    "in turn": [0, 1] * 9,
}


def check(kernel: Kernel, kv_heads: int, which: Sequence[int], window: int | None = None) -> None:
    x = numbers(len(which), HIDDEN, seed=5)
    alone = Sequences(kernel, kv_heads, window)
    expected = alone.attend(x, which, 1)
    assert expected.isfinite().all()
    assert expected.norm() > 1
    for at_once in (len(x), 13, 5):
        together = Sequences(kernel, kv_heads, window)
        assert torch.equal(together.attend(x, which, at_once), expected)
        assert all(map(torch.equal, chain(*together.caches), chain(*alone.caches)))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_in_groups(dtype: torch.dtype, kv_heads: int, arrangement: str, num_threads: int) -> None:
    check(grouped(kv_heads, dtype), kv_heads, ARRANGEMENTS[arrangement])


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_latents(dtype: torch.dtype, arrangement: str, num_threads: int) -> None:
    check(latent(dtype), 1, ARRANGEMENTS[arrangement])


@pytest.mark.parametrize("window", [1, 16, 505, 600])
def test_windows(window: int, num_threads: int) -> None:
    """Which begin to slide before the tokens, at one of them, or behind them."""
    check(grouped(2, torch.bfloat16), 2, ARRANGEMENTS["two"], window)


@pytest.mark.parametrize("kernel", [(grouped, 1), (grouped, 2), (grouped, 3), (latent, 1)])
def test_sections_of_long_contexts_are_divided_among_many_threads(kernel: tuple[Any, int]) -> None:
    """Of a few guessed rows, and of several sequences, one of which has fewer sections."""
    make, kv_heads = kernel
    made = make(torch.bfloat16) if make is latent else make(kv_heads, torch.bfloat16)
    for which in ([0] * 8, [0, 0, 1, 0, 0, 2, 2, 2]):
        x, expected = numbers(len(which), HIDDEN, seed=5), None
        for num_threads in (1, 2, 3, 8, 17, 32):
            kernels.set_threads(num_threads)
            at_once = 1 if expected is None else len(which)
            found = Sequences(made, kv_heads, lengths=(2043, 700, 5)).attend(x, which, at_once)
            assert expected is None or torch.equal(found, expected)
            expected = found
    kernels.set_threads(1)


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
def test_every_set(instruction_set: str) -> None:
    kernels.select_instruction_set(instruction_set)
    check(grouped(1, torch.bfloat16), 1, ARRANGEMENTS["two"])
    check(latent(torch.bfloat16), 1, ARRANGEMENTS["one"])


def test_more_rows_than_a_call_takes_at_once() -> None:
    """Projections and attention are computed for a part of them at a time."""
    check(grouped(6, torch.bfloat16), 6, [0] * 300)


def test_a_value_that_is_no_number_spoils_the_tokens_behind_it_alone() -> None:
    kernel, x = grouped(2, torch.bfloat16), numbers(40, HIDDEN, seed=5)
    x[17] = torch.nan
    out = Sequences(kernel, 2).attend(x, [0] * 40, 40)
    assert out[:17].isfinite().all()
    assert out[17:].isnan().any(dim=1).all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("length", [7, 64])
def test_norms(length: int, has_bias: bool, num_threads: int) -> None:
    x, weight = numbers(70, length, seed=length) * 30, numbers(length, seed=1)
    bias = numbers(length, seed=2) if has_bias else None
    kernel, together, alone = kernels.NormKernel(weight, 1e-3, bias), torch.empty_like(x), torch.empty_like(x)
    kernel.step(x, together)
    for row, out in zip(x, alone, strict=True):
        kernel.step(row, out)
    assert torch.equal(together, alone)
    rms_norm, layer_norm = torch.nn.functional.rms_norm, torch.nn.functional.layer_norm
    expected = layer_norm(x, [length], weight, bias, 1e-3) if has_bias else rms_norm(x, [length], weight, 1e-3)
    assert torch.allclose(together, expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{"is_sigmoid": True}, {}, {"jitter": 0.1}])
def test_routers(settings: dict[str, Any], num_threads: int) -> None:
    linear, x = make_linear("bf16", 21, 40), numbers(70, 40, seed=3)
    kernel = kernels.RouterKernel(linear, top_k=5, is_of_chosen=True, **settings)

    def route(rows: Tensor) -> list[Tensor]:
        count = len(rows)
        routed = torch.empty(count, 21), torch.empty(count, 5), torch.empty(count, 5, dtype=torch.int64)
        kernel.step(rows, *routed)
        return list(routed)

    alone = [torch.cat(parts) for parts in zip(*(route(row) for row in x.split(1)), strict=True)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(route(x), alone, strict=True))
    assert len(alone[2].unique()) == 21


def test_shared_experts(num_threads: int) -> None:
    sizes = [(40, HIDDEN), (40, HIDDEN), (HIDDEN, 40)]
    mlp = kernels.MlpKernel(*(in_panels(make_linear("int8", *size)) for size in sizes), activation="silu")
    kernel, x = kernels.SharedKernel(mlp, numbers(HIDDEN, seed=4)), numbers(150, HIDDEN, seed=6)
    start = numbers(150, HIDDEN, seed=7)
    together, alone = start.clone(), start.clone()
    kernel.add(x, together)
    for row, out in zip(x.split(1), alone.split(1), strict=True):
        kernel.add(row, out)
    assert torch.equal(together, alone)
    assert (together - start).norm() > 1
