"""Attention of the card with the sizes of real models, and with sizes and rows at random; minutes."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.cuda import delta, routers, shim
from tests.support.cuda.attention import Grouped, Latent, Setting, case_of, program
from tests.support.cuda.bits import are_same, random_floats
from tests.support.cuda.pages import Sequence
from tests.support.cuda.routers import Router

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")]

REAL = {
    "Qwen3-30B-A3B": Grouped(num_heads=32, num_kv_heads=4, head_dim=128, rotated_dims=128, norm_span="head"),
    "Mixtral-8x7B": Grouped(num_heads=32, num_kv_heads=8, head_dim=128, rotated_dims=128),
    "OLMoE-1B-7B": Grouped(num_heads=16, num_kv_heads=16, head_dim=128, rotated_dims=128, norm_span="all heads"),
    "gpt-oss": Grouped(num_heads=64, num_kv_heads=8, head_dim=64, rotated_dims=64),
    "GLM-4.5-Air": Grouped(num_heads=96, num_kv_heads=8, head_dim=128, rotated_dims=64, norm_span="head"),
    "Qwen2-57B-A14B": Grouped(num_heads=28, num_kv_heads=4, head_dim=128, rotated_dims=128),
    "MiniMax-M2": Grouped(num_heads=48, num_kv_heads=8, head_dim=128, rotated_dims=64, norm_span="all heads"),
    "Qwen3-235B-A22B": Grouped(num_heads=64, num_kv_heads=4, head_dim=128, rotated_dims=128, norm_span="head"),
    "PowerMoE-3b": Grouped(num_heads=24, num_kv_heads=8, head_dim=64, rotated_dims=64),
    "DeepSeek-V2-Lite": Latent(num_heads=16, unrotated_dims=128, rotated_dims=64, value_dims=128, rank=512, max_rows=4),
    "GLM-4.7-Flash": Latent(
        num_heads=20,
        unrotated_dims=192,
        rotated_dims=64,
        value_dims=256,
        rank=512,
        rotation="pairs_to_halves",
        max_rows=4,
    ),
}
ROWS = (Sequence(length=1100, num_rows=3), Sequence(length=40))


@pytest.mark.parametrize("name", REAL)
def test_sizes_of_real_models(name: str) -> None:
    library = program((REAL[name],))
    for seed, num_blocks in enumerate((2, 400)):
        case_of(REAL[name], Setting(sequences=ROWS, has_biases=True), seed).check(
            library, num_blocks=num_blocks, seed=seed
        )
    sinks = isinstance(REAL[name], Grouped)
    windowed = Setting(sequences=(Sequence(length=900, num_rows=2),), window=128, has_sinks=sinks, is_one_room=True)
    case_of(REAL[name], windowed, 2).check(library, seed=2)


def test_a_long_context() -> None:
    """More sections than a block has units."""
    shape = replace(REAL["OLMoE-1B-7B"], num_heads=2, num_kv_heads=2)
    case_of(shape, Setting(sequences=(Sequence(length=8000, num_rows=2),)), 3).check(program((shape,)), seed=3)


def random_shape(random: np.random.Generator) -> Grouped | Latent:
    rotation = str(random.choice(["halves", "pairs", "pairs_to_halves"]))
    if random.random() < 0.4:
        return Latent(
            num_heads=int(random.integers(1, 20)),
            unrotated_dims=int(random.integers(1, 20)) * 8,
            rotated_dims=int(random.integers(1, 5)) * 16,
            value_dims=int(random.integers(1, 40)) * 4,
            rank=int(random.integers(1, 33)) * 16,
            rotation=rotation,
            codec=str(random.choice(["bf16", "fp32"])),
        )
    num_kv_heads, dim = int(random.integers(1, 5)), int(random.integers(1, 17)) * 16
    return Grouped(
        num_heads=num_kv_heads * int(random.integers(1, 20)),
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        rotated_dims=int(random.integers(0, dim // 2 + 1)) * 2,
        rotation=rotation,
        norm_span=str(random.choice(["none", "head", "all heads"])),
    )


def random_rows(random: np.random.Generator) -> tuple[Sequence, ...]:
    counts: list[int] = []
    while (left := 8 - sum(counts)) > 0 and len(counts) < 4:
        counts.append(int(random.integers(1, left + 1)))
    return tuple(
        Sequence(length=int(random.integers(0, 1300)), num_rows=count, base=int(random.integers(0, 300)))
        for count in counts
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_sizes_and_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = random_shape(random)
    library = program((shape,))
    for number in range(4):
        setting = Setting(
            sequences=random_rows(random),
            window=int(random.choice([0, 0, 1, 7, 128, 511, 513])),
            has_sinks=isinstance(shape, Grouped) and bool(random.integers(2)),
            has_biases=bool(random.integers(2)),
            is_one_room=bool(random.integers(2)),
            num_special=int(random.integers(3)),
        )
        num_blocks = int(random.choice([1, 5, 100, 1000]))
        case_of(shape, setting, seed + number).check(library, num_blocks=num_blocks, seed=number)


@pytest.mark.parametrize("seed", range(8))
def test_random_routers(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_groups = int(random.choice([1, 2, 4, 8]))
    size, num_chosen = int(random.integers(1, 50)), int(random.integers(1, num_groups + 1))
    router = Router(
        num_experts=num_groups * size,
        top_k=int(random.integers(1, min(64, size * num_chosen) + 1)),
        is_sigmoid=bool(random.integers(2)),
        is_of_chosen=bool(random.integers(2)),
        num_groups=num_groups,
        num_chosen_groups=num_chosen,
        num_best=int(random.integers(1, 3)),
    )
    library = routers.program([router])
    for number in range(30):
        logits = random_floats(random, 8, router.num_experts, num_special=int(random.integers(4)))
        if number % 2:
            logits = np.where(np.abs(logits) < 8, np.round(logits.clip(-8, 8) * 4) / 4, logits)
        correction = random_floats(random, router.num_experts, scale=0.1) if random.integers(2) else None
        ids, weights = routers.route(library, router, logits, correction, 1.5, seed=number)
        expected_ids, expected_weights = routers.expected(router, logits, correction, 1.5)
        assert ids.tolist() == expected_ids.tolist()
        assert are_same(weights, expected_weights)


def random_delta(random: np.random.Generator) -> delta.Sizes:
    return delta.Sizes(
        num_key_heads=int(random.integers(1, 6)),
        num_shared=int(random.integers(1, 5)),
        key_dim=16 * int(random.integers(1, 9)),
        value_dim=16 * int(random.integers(1, 9)),
        num_taps=int(random.integers(1, 6)),
        is_joined=bool(random.integers(2)),
        has_bias=bool(random.integers(2)),
    )


def test_random_delta_rules() -> None:
    random = np.random.default_rng(11)
    all_sizes = [
        delta.Sizes(num_key_heads=16, num_shared=2, key_dim=128, value_dim=128),  # Qwen3-Next-80B-A3B
        *(random_delta(random) for _ in range(8)),
    ]
    library = delta.program(tuple(all_sizes))
    for seed, sizes in enumerate(all_sizes):
        lengths = random.integers(1, 5, size=2)
        rows = [delta.Moves(places=[tuple(random.integers(4, size=2)) for _ in range(count)]) for count in lengths]
        delta.DeltaCase(sizes, rows, seed).check(library, seed=seed)
        delta.DeltaCase(sizes, rows, seed, num_special=4).check(library, seed=seed + 1)
