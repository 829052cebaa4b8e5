"""Running totals and what is read off them."""

from offload_moe.chat.stats import TurnStats
from offload_moe.residency.counters import Counters


def turn(num_prompt_tokens: int, num_reused_tokens: int, num_decode_tokens: int) -> TurnStats:
    return TurnStats(
        num_prompt_tokens=num_prompt_tokens,
        num_reused_tokens=num_reused_tokens,
        reuse="continued",
        prompt_s=2.0,
        num_decode_tokens=num_decode_tokens,
        decode_s=5.0,
        finish="stop",
    )


def test_rates_are_zero_before_anything_happened() -> None:
    counters = Counters()
    assert (counters.hit_rate, counters.prompt_tokens_per_s, counters.decode_tokens_per_s) == (0.0, 0.0, 0.0)


def test_answers_add_their_tokens() -> None:
    counters = Counters()
    turn(30, 10, 11).add_tokens_to(counters)
    turn(8, 0, 21).add_tokens_to(counters)
    turn(4, 0, 0).add_tokens_to(counters)
    assert counters.num_prompt_tokens == 20 + 8 + 4
    assert counters.num_decode_tokens == 10 + 20
    assert counters.prompt_tokens_per_s == 32 / 6
    assert counters.decode_tokens_per_s == 2.0


def test_a_difference_counts_only_what_came_since() -> None:
    counters = Counters(num_hits=3, num_misses=1, stall_s=0.5)
    earlier = counters.copy()
    counters.num_hits += 1
    counters.num_delayed_hits += 1
    since = counters.since(earlier)
    assert (since.num_accesses, since.num_hits, since.hit_rate) == (2, 1, 0.5)
    assert since.stall_s == 0.0
