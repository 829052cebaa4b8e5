"""What usually follows: learned from tokens, by layer and depth, silent while it knows nothing."""

import numpy as np

from offload_moe.residency.co_occurrence import LEAST_TOKENS, CoOccurrence

NUM_LAYERS, NUM_EXPERTS = 4, 16


def teach(habits: CoOccurrence, num_tokens: int, seed: int = 0) -> None:
    """Expert e is always followed by e + 1, one layer later."""
    draw = np.random.default_rng(seed)
    for _ in range(num_tokens):
        experts = draw.choice(NUM_EXPERTS, 2, replace=False)
        for layer in range(NUM_LAYERS):
            habits.learn(layer, [int(expert) for expert in (experts + layer) % NUM_EXPERTS])


def test_it_foretells_what_follows_at_every_depth() -> None:
    habits = CoOccurrence(NUM_LAYERS, NUM_EXPERTS, depth=2)
    teach(habits, 400)
    for expert in range(NUM_EXPERTS):
        assert habits.predict(0, [expert], 1, 1) == [(expert + 1) % NUM_EXPERTS]
        assert habits.predict(1, [expert], 2, 1) == [(expert + 2) % NUM_EXPERTS]


def test_it_is_silent_before_it_knows_and_beyond_its_depth() -> None:
    habits = CoOccurrence(NUM_LAYERS, NUM_EXPERTS, depth=1)
    teach(habits, LEAST_TOKENS)
    assert habits.predict(0, [3], 1, 4) == []
    teach(habits, 100)
    assert habits.predict(0, [3], 1, 1) == [4]
    assert habits.predict(0, [3], 2, 1) == []


def test_the_likeliest_comes_first() -> None:
    habits = CoOccurrence(2, NUM_EXPERTS, depth=1)
    for token in range(60):
        habits.learn(0, [5])
        habits.learn(1, [7] if token % 3 else [9])
    assert habits.predict(0, [5], 1, 8) == [7, 9]
