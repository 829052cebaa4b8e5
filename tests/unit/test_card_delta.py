"""Linear attention of the card, executed on the CPU: the library's bits, in results and all places of states."""

import numpy as np
import pytest

from tests.support.cuda import shim
from tests.support.cuda.delta import DeltaCase, Moves, Sizes, program

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

SIZES = {
    "joined": Sizes(num_key_heads=2, num_shared=2, key_dim=16, value_dim=32),
    "apart": Sizes(num_key_heads=3, num_shared=1, key_dim=48, value_dim=16, num_taps=3, is_joined=False, has_bias=True),
    "many": Sizes(num_key_heads=1, num_shared=5, key_dim=16, value_dim=80, num_taps=2),
}
SEQUENCES = {
    "a token in place": [Moves(places=[(2, 2)])],
    "tokens in place": [Moves(places=[(0, 0)] * 3)],
    "guesses": [Moves(places=[(1, 0), (0, 2), (2, 3)])],
    "sequences": [Moves(places=[(0, 1)]), Moves(places=[(0, 0), (0, 0)]), Moves(places=[(3, 1), (1, 2), (2, 0)])],
    "eight rows": [Moves(places=[(0, 1), (1, 2)] * 2), Moves(places=[(1, 1)]), Moves(places=[(0, 3)] * 3)],
}


@pytest.fixture(scope="module")
def library() -> shim.ShimLibrary:
    return program(tuple(SIZES.values()))


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_have_the_librarys_bits(library: shim.ShimLibrary, sizes: str, sequences: str) -> None:
    out = DeltaCase(SIZES[sizes], SEQUENCES[sequences], seed=len(sequences)).check(library)
    assert np.isfinite(out).all()
    assert np.abs(out).max() > 0.1


@pytest.mark.parametrize("sizes", SIZES)
def test_special_numbers_are_the_librarys(library: shim.ShimLibrary, sizes: str) -> None:
    shares = []
    for seed in range(8):
        out = DeltaCase(SIZES[sizes], SEQUENCES["guesses"], seed, num_special=3).check(library, seed=seed)
        shares.append(float(np.isnan(out).mean()))
    assert min(shares) < 1
    assert max(shares) > 0


@pytest.mark.parametrize("sizes", SIZES)
def test_times_that_are_their_own_softplus(library: shim.ShimLibrary, sizes: str) -> None:
    """Some behind what an exponential can be, with decays so slow that states do not vanish."""
    case = DeltaCase(SIZES[sizes], SEQUENCES["sequences"], seed=4, scales=(0.003, 400.0))
    assert case.time_biases.max() > 100
    assert np.isfinite(case.check(library)).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_threads_gives_the_same(library: shim.ShimLibrary, seed: int) -> None:
    for sizes in SIZES.values():
        DeltaCase(sizes, SEQUENCES["sequences"], seed).check(library, seed=seed)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_stopped_pass_writes_nothing(library: shim.ShimLibrary, sizes: str) -> None:
    case = DeltaCase(SIZES[sizes], SEQUENCES["sequences"])
    before = [each.copy() for each in (*case.inputs, *case.states)]
    out, inputs = case.run(library, is_stopped=True)
    assert np.isnan(out).all()
    assert all((quants == 99).all() for quants in inputs.quants)
    assert all(np.array_equal(*pair) for pair in zip((*case.inputs, *case.states), before, strict=True))
