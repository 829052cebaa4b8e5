"""Routers of the card, executed on the CPU: the experts and the bits of weights that the library chooses."""

import numpy as np
import pytest

from tests.support.cuda import routers, shim
from tests.support.cuda.bits import are_same, random_floats
from tests.support.cuda.routers import Router

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

ROUTERS = {
    "Qwen3": Router(num_experts=40, top_k=6, is_of_chosen=False),
    "Mixtral": Router(num_experts=8, top_k=2),
    "many chosen": Router(num_experts=96, top_k=33),
    "DeepSeek-V2": Router(num_experts=40, top_k=6, is_of_chosen=False, num_groups=8, num_chosen_groups=3, num_best=1),
    "DeepSeek-V3": Router(num_experts=40, top_k=6, is_sigmoid=True, num_groups=8, num_chosen_groups=3),
    "single groups": Router(num_experts=40, top_k=20, num_groups=40, num_chosen_groups=20),
    "MiniMax": Router(num_experts=300, top_k=8, is_sigmoid=True),
    "Phi-3.5-MoE": Router(num_experts=16, top_k=2, is_of_chosen=False, jitter=0.01),
    "a mixer that takes half": Router(num_experts=40, top_k=20, is_of_chosen=False, jitter=0.3),
    "Llama4": Router(num_experts=16, top_k=1, is_sigmoid=True, is_of_chosen=False),
}


@pytest.fixture(scope="module")
def library() -> shim.ShimLibrary:
    return routers.program(list(ROUTERS.values()))


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_has_the_bits_of_the_cpu(library: shim.ShimLibrary, name: str, is_corrected: bool) -> None:
    router, random = ROUTERS[name], np.random.default_rng(7)
    chosen = set()
    for num_rows, scale in ((1, 1.0), (3, 2.5), (8, 0.3)):
        logits = random_floats(random, num_rows, router.num_experts, scale=2.0)
        correction = random_floats(random, router.num_experts, scale=0.1) if is_corrected else None
        ids, weights = routers.route(library, router, logits, correction, scale, seed=num_rows)
        expected_ids, expected_weights = routers.expected(router, logits, correction, scale)
        assert ids.tolist() == expected_ids.tolist()
        assert are_same(weights, expected_weights)
        assert (weights != 0).all()
        chosen |= set(ids.flatten().tolist())
    assert len(chosen) >= min(8, router.num_experts // 2)


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_equal_and_special_logits_are_ranked_as_on_the_cpu(
    library: shim.ShimLibrary, name: str, is_corrected: bool
) -> None:
    router, random = ROUTERS[name], np.random.default_rng(8)
    for num_special in (0, 1, 3, router.num_experts):
        logits = random.integers(-2, 3, (8, router.num_experts)).astype(np.float32)
        places = random.integers(logits.size, size=num_special)
        logits.reshape(-1)[places] = random.choice([np.nan, np.inf, -np.inf, -0.0], num_special)
        logits[7] = np.nan if num_special > 3 else logits[7]
        correction = random.integers(0, 2, router.num_experts).astype(np.float32) if is_corrected else None
        ids, weights = routers.route(library, router, logits, correction, 1.0, seed=2)
        expected_ids, expected_weights = routers.expected(router, logits, correction, 1.0)
        assert ids.tolist() == expected_ids.tolist()
        assert are_same(weights, expected_weights)


def test_a_stopped_pass_chooses_nothing(library: shim.ShimLibrary) -> None:
    router = ROUTERS["DeepSeek-V3"]
    logits = random_floats(np.random.default_rng(9), 2, router.num_experts)
    ids, weights = routers.route(library, router, logits, None, 1.0, is_stopped=True)
    assert (ids == -1).all()
    assert np.isnan(weights).all()
