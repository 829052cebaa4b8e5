"""Grouped-query attention of the card, executed on the CPU: the bits of the portable C, for rows of any sequences."""

import numpy as np
import pytest

from tests.support.cuda import shim
from tests.support.cuda.attention import Grouped, GroupedCase, program
from tests.support.cuda.attention_cases import SETTINGS, check, check_special_numbers, check_stopped
from tests.support.cuda.bits import from_bf16

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

SHAPES = {
    "Qwen3": Grouped(num_heads=8, num_kv_heads=2, head_dim=32, rotated_dims=32, norm_span="head"),
    "OLMoE": Grouped(num_heads=4, num_kv_heads=4, head_dim=16, rotated_dims=16, norm_span="all heads"),
    "gpt-oss": Grouped(num_heads=16, num_kv_heads=2, head_dim=64, rotated_dims=64),
    "Ernie": Grouped(num_heads=12, num_kv_heads=1, head_dim=16, rotated_dims=16, rotation="pairs"),
    "GLM": Grouped(num_heads=5, num_kv_heads=1, head_dim=48, rotated_dims=24, norm_span="head"),
    "Qwen3.5": Grouped(num_heads=14, num_kv_heads=2, head_dim=256, rotated_dims=64, rotation="pairs_to_halves"),
    "Llama 4": Grouped(
        num_heads=10, num_kv_heads=2, head_dim=32, rotated_dims=32, rotation="pairs", norm_span="rotated"
    ),
    "HunYuan": Grouped(num_heads=4, num_kv_heads=2, head_dim=144, rotated_dims=80, norm_span="rotated"),
    "Qwen3-Next": Grouped(num_heads=8, num_kv_heads=2, head_dim=32, rotated_dims=16, norm_span="head", is_gated=True),
    "groups of nine": Grouped(num_heads=18, num_kv_heads=2, head_dim=16, rotated_dims=0),
    "without rotation": Grouped(num_heads=3, num_kv_heads=1, head_dim=128, rotated_dims=0, norm_span="head"),
}


@pytest.fixture(scope="module")
def library() -> shim.ShimLibrary:
    return program(tuple(SHAPES.values()))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_has_the_bits_of_the_cpu(library: shim.ShimLibrary, shape: str, setting: str) -> None:
    check(library, SHAPES[shape], setting)


@pytest.mark.parametrize("shape", SHAPES)
def test_special_numbers_are_those_of_the_cpu(library: shim.ShimLibrary, shape: str) -> None:
    check_special_numbers(library, SHAPES[shape])


def test_keys_and_values_are_rounded_to_even(library: shim.ShimLibrary) -> None:
    """Halfway between two numbers of bf16; infinite and NaN, whose last bits alone say so."""
    halfway = (np.arange(0x3F7A, 0x3F88, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    special = np.array([0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF800000], np.uint32).view(np.float32)
    shape = SHAPES["groups of nine"]
    case = GroupedCase(shape, SETTINGS["the first token"])
    values = np.resize(np.concatenate((halfway, special)), case.heads[2].shape).astype(np.float32)
    case.heads[1][...] = case.heads[2][...] = values
    case.check(library)
    (pair,) = case.cache.planes
    found = from_bf16(pair[1].read()).reshape(-1)[: len(halfway)]
    assert (found.view(np.uint32) >> 16 & 1 == 0).all()
    assert np.isnan(from_bf16(pair[1].read())).sum() == np.isnan(values).sum() > 0


@pytest.mark.parametrize("num_blocks", [1, 7, 300])
@pytest.mark.parametrize("shape", ["gpt-oss", "GLM"])
def test_any_number_of_blocks_gives_the_same(library: shim.ShimLibrary, shape: str, num_blocks: int) -> None:
    """With few a unit has several heads, with many one."""
    check(library, SHAPES[shape], "several sequences", num_blocks=num_blocks, seed=num_blocks)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_threads_gives_the_same(library: shim.ShimLibrary, seed: int) -> None:
    check(library, SHAPES["Qwen3"], "rows of one sequence", num_blocks=4, seed=seed)
    check(library, SHAPES["Qwen3.5"], "a window of sections", num_blocks=1, seed=seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stopped_pass_writes_nothing(library: shim.ShimLibrary, shape: str) -> None:
    check_stopped(library, SHAPES[shape])
