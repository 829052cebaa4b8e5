"""Attention and routers of the card, executed on the CPU: the bits of the portable C, for rows of any sequences."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.cuda import routers, shim
from tests.support.cuda.attention import Case, Grouped, Latent, Setting, case_of, program
from tests.support.cuda.bits import are_same, random_floats
from tests.support.cuda.pages import Sequence
from tests.support.cuda.routers import Router

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

SHAPES = {
    "Qwen3": Grouped(num_heads=8, num_kv_heads=2, head_dim=32, rotated_dims=32, norm_span="head"),
    "OLMoE": Grouped(num_heads=4, num_kv_heads=4, head_dim=16, rotated_dims=16, norm_span="all heads"),
    "gpt-oss": Grouped(num_heads=16, num_kv_heads=2, head_dim=64, rotated_dims=64),
    "Ernie": Grouped(num_heads=12, num_kv_heads=1, head_dim=16, rotated_dims=16, rotation="pairs"),
    "GLM": Grouped(num_heads=5, num_kv_heads=1, head_dim=48, rotated_dims=24, norm_span="head"),
    "Qwen3.5": Grouped(num_heads=14, num_kv_heads=2, head_dim=256, rotated_dims=64, rotation="pairs_to_halves"),
    "without rotation": Grouped(num_heads=3, num_kv_heads=1, head_dim=128, rotated_dims=0, norm_span="head"),
    "DeepSeek-V2": Latent(num_heads=6, unrotated_dims=24, rotated_dims=16, value_dims=20, rank=48),
    "DeepSeek-V3": Latent(
        num_heads=9,
        unrotated_dims=64,
        rotated_dims=32,
        value_dims=64,
        rank=512,
        rotation="pairs_to_halves",
        codec="fp32",
    ),
}
SETTINGS = {
    "the first token": Setting(sequences=(Sequence(length=0),)),
    "two sections": Setting(sequences=(Sequence(length=700),), has_biases=True),
    "rows of one sequence": Setting(sequences=(Sequence(length=509, num_rows=5),)),
    "several sequences": Setting(
        sequences=(Sequence(length=3), Sequence(length=1030, num_rows=3, base=77), Sequence(length=127, num_rows=4)),
    ),
    "one room": Setting(sequences=(Sequence(length=130, num_rows=2),), is_one_room=True, has_sinks=True),
    "a window": Setting(sequences=(Sequence(length=300, num_rows=3), Sequence(length=60)), window=128, has_sinks=True),
    "a window of sections": Setting(sequences=(Sequence(length=777, base=5),), window=600),
    "a window of one": Setting(sequences=(Sequence(length=128, num_rows=2),), window=1),
}
SINKLESS = {"DeepSeek-V2", "DeepSeek-V3"}


def made(shape: str, setting: str, seed: int = 0) -> Case:
    options = SETTINGS[setting]
    return case_of(SHAPES[shape], replace(options, has_sinks=options.has_sinks and shape not in SINKLESS), seed)


@pytest.fixture(scope="module")
def library() -> shim.ShimLibrary:
    return program(tuple(SHAPES.values()))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_has_the_bits_of_the_cpu(library: shim.ShimLibrary, shape: str, setting: str) -> None:
    made(shape, setting).check(library)


@pytest.mark.parametrize("shape", SHAPES)
def test_special_numbers_are_those_of_the_cpu(library: shim.ShimLibrary, shape: str) -> None:
    """NaN, infinite, subnormal and huge ones, of which some spoil a part of the results only."""
    setting = Setting(sequences=(Sequence(length=570, num_rows=2),), has_biases=True, num_special=2)
    num_spoiled = []
    for seed in range(4):
        case = case_of(SHAPES[shape], replace(setting, has_sinks=shape not in SINKLESS), seed)
        num_spoiled.append(int(np.isnan(case.check(library, seed=seed)).sum()))
    assert min(num_spoiled) < case.num_rows * case.columns


@pytest.mark.parametrize("num_blocks", [1, 7, 300])
@pytest.mark.parametrize("shape", ["gpt-oss", "DeepSeek-V3"])
def test_any_number_of_blocks_gives_the_same(library: shim.ShimLibrary, shape: str, num_blocks: int) -> None:
    """With few a unit has several heads, with many one."""
    made(shape, "several sequences", seed=1).check(library, num_blocks=num_blocks, seed=num_blocks)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", ["Qwen3", "DeepSeek-V2"])
def test_any_order_of_threads_gives_the_same(library: shim.ShimLibrary, shape: str, seed: int) -> None:
    made(shape, "rows of one sequence", seed).check(library, num_blocks=4, seed=seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stopped_pass_writes_nothing(library: shim.ShimLibrary, shape: str) -> None:
    case = made(shape, "rows of one sequence")
    before = [plane.pool.copy() for planes in case.cache.planes for plane in planes]
    query, out, inputs = case.run(library, is_stopped=True)
    after = [plane.pool for planes in case.cache.planes for plane in planes]
    assert np.isnan(query).all()
    assert np.isnan(out).all()
    assert all((quants == 99).all() for quants in inputs.quants)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


ROUTERS = {
    "Qwen3": Router(num_experts=40, top_k=6, is_of_chosen=False),
    "Mixtral": Router(num_experts=8, top_k=2),
    "many chosen": Router(num_experts=96, top_k=33),
    "DeepSeek-V2": Router(num_experts=40, top_k=6, is_of_chosen=False, num_groups=8, num_chosen_groups=3, num_best=1),
    "DeepSeek-V3": Router(num_experts=40, top_k=6, is_sigmoid=True, num_groups=8, num_chosen_groups=3),
    "single groups": Router(num_experts=40, top_k=20, num_groups=40, num_chosen_groups=20),
    "MiniMax": Router(num_experts=300, top_k=8, is_sigmoid=True),
    "Llama4": Router(num_experts=16, top_k=1, is_sigmoid=True, is_of_chosen=False),
}


@pytest.fixture(scope="module")
def router_library() -> shim.ShimLibrary:
    return routers.program(list(ROUTERS.values()))


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_has_the_bits_of_the_cpu(router_library: shim.ShimLibrary, name: str, is_corrected: bool) -> None:
    router, random = ROUTERS[name], np.random.default_rng(7)
    chosen = set()
    for num_rows, scale in ((1, 1.0), (3, 2.5), (8, 0.3)):
        logits = random_floats(random, num_rows, router.num_experts, scale=2.0)
        correction = random_floats(random, router.num_experts, scale=0.1) if is_corrected else None
        ids, weights = routers.route(router_library, router, logits, correction, scale, seed=num_rows)
        expected_ids, expected_weights = routers.expected(router, logits, correction, scale)
        assert ids.tolist() == expected_ids.tolist()
        assert are_same(weights, expected_weights)
        assert (weights != 0).all()
        chosen |= set(ids.flatten().tolist())
    assert len(chosen) >= min(8, router.num_experts // 2)


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_equal_and_special_logits_are_ranked_as_on_the_cpu(
    router_library: shim.ShimLibrary, name: str, is_corrected: bool
) -> None:
    router, random = ROUTERS[name], np.random.default_rng(8)
    for num_special in (0, 1, 3, router.num_experts):
        logits = random.integers(-2, 3, (8, router.num_experts)).astype(np.float32)
        places = random.integers(logits.size, size=num_special)
        logits.reshape(-1)[places] = random.choice([np.nan, np.inf, -np.inf, -0.0], num_special)
        logits[7] = np.nan if num_special > 3 else logits[7]
        correction = random.integers(0, 2, router.num_experts).astype(np.float32) if is_corrected else None
        ids, weights = routers.route(router_library, router, logits, correction, 1.0, seed=2)
        expected_ids, expected_weights = routers.expected(router, logits, correction, 1.0)
        assert ids.tolist() == expected_ids.tolist()
        assert are_same(weights, expected_weights)
