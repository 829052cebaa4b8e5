"""Latent attention of the card, executed on the CPU: the bits of the portable C, for rows of any sequences."""

import pytest

from tests.support.cuda import shim
from tests.support.cuda.attention import Latent, program
from tests.support.cuda.attention_cases import SETTINGS, check, check_special_numbers, check_stopped

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

SHAPES = {
    "small": Latent(num_heads=6, unrotated_dims=24, rotated_dims=16, value_dims=20, rank=48),
    "DeepSeek": Latent(
        num_heads=9,
        unrotated_dims=64,
        rotated_dims=32,
        value_dims=64,
        rank=512,
        rotation="pairs_to_halves",
        codec="fp32",
    ),
    "halves": Latent(
        num_heads=2, unrotated_dims=72, rotated_dims=32, value_dims=32, rank=80, rotation="halves", codec="fp32"
    ),
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


@pytest.mark.parametrize("num_blocks", [1, 300])
def test_any_number_of_blocks_gives_the_same(library: shim.ShimLibrary, num_blocks: int) -> None:
    check(library, SHAPES["DeepSeek"], "several sequences", num_blocks=num_blocks, seed=num_blocks)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_threads_gives_the_same(library: shim.ShimLibrary, seed: int) -> None:
    check(library, SHAPES["small"], "rows of one sequence", num_blocks=4, seed=seed)
    check(library, SHAPES["DeepSeek"], "two sections", num_blocks=1, seed=seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stopped_pass_writes_nothing(library: shim.ShimLibrary, shape: str) -> None:
    check_stopped(library, SHAPES[shape])
