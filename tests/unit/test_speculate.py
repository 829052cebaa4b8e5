"""Sources of guesses, what passes cost, and how many guesses pay."""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from offload_moe.errors import ConfigError
from offload_moe.profile.guesses import guesses
from offload_moe.profile.trace import Trace
from offload_moe.residency.counters import Counters
from offload_moe.speculate import speculator
from offload_moe.speculate.choice import check_choice
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import Governor
from offload_moe.speculate.guess import MOST_GUESSES, Guess
from offload_moe.speculate.ngram import NgramSource
from offload_moe.speculate.row_governor import RowGovernor
from offload_moe.speculate.speculator import PassCost, Speculator
from offload_moe.speculate.tally import Tally

PLAIN_S = 0.02
Cost = Callable[[int], float]  # of a pass of so many rows, in plain ones


def costs_with(ratio: float, num_rows: int = 4) -> PassCosts:
    costs = PassCosts()
    costs.note(1, PLAIN_S, 0)
    costs.note(num_rows, PLAIN_S * ratio, 0)
    return costs


def test_costs_are_measured_and_estimated_between() -> None:
    assert PassCosts().ratio(1) == 1
    assert 1 < PassCosts().ratio(2) < PassCosts().ratio(8) < 3
    costs = costs_with(2.5, num_rows=4)
    assert costs.ratio(4) == pytest.approx(2.5)
    assert costs.ratio(7) == pytest.approx(4)
    assert costs.ratio(1) == 1


def test_one_slow_pass_does_not_count_for_all_time() -> None:
    costs = costs_with(1.3)
    costs.note(4, PLAIN_S * 100, 0)
    assert costs.ratio(4) < 4
    for _ in range(300):
        costs.note(1, PLAIN_S, 0)
    assert costs.ratio(4) < 2
    costs.note(1, PLAIN_S * 1000, 0)
    assert costs.plain_s < 2 * PLAIN_S


def test_a_cost_is_unknown_before_the_first_plain_pass() -> None:
    costs = PassCosts()
    costs.note(8, 1.0, 0)
    assert costs.ratio(8) == PassCosts().ratio(8)
    assert Governor(costs, (1.0,), is_free=True).choose(0, 7) == 0


@pytest.mark.parametrize(("certainty", "ratio", "expected"), [(0.95, 1.5, 7), (0.95, 30, 0), (0.1, 1.5, 0)])
def test_as_many_are_computed_as_pay(certainty: float, ratio: float, expected: int) -> None:
    assert Governor(costs_with(ratio, 8), (certainty,), is_free=True).choose(0, 7) == expected


def test_a_middle_number_may_pay_best() -> None:
    assert 0 < Governor(costs_with(2.4, 8), (0.7,), is_free=True).choose(0, 7) < 7
    assert Governor(costs_with(1.5, 8), (0.95,), is_free=True).choose(0, 3) == 3
    assert Governor(costs_with(1.5, 8), (0.95,), is_free=True).choose(0, 0) == 0


class Scripted:
    """Guesses that are right as a function of the position in the sequence says. All tokens are 7."""

    certainties = (0.7,)

    def __init__(self, is_right: Callable[[int], bool], *, is_free: bool) -> None:
        self.is_free, self._is_right, self._length = is_free, is_right, 0

    def begin(self, ids: Sequence[int]) -> None:
        self._length = len(ids)

    def take(self, token: int) -> None:
        self._length += 1

    def guess(self, most: int) -> Guess:
        return Guess(tuple(7 if self._is_right(self._length + at) else 8 for at in range(most)))


def decode(speculator: Speculator, num_tokens: int, cost: Cost, at: int = 0) -> tuple[float, list[int]]:
    """Seconds of an answer in scripted passes, and after how many tokens a pass had how many guesses."""
    spent, made, done = 0.0, [0] * (num_tokens + 8), at
    speculator.begin([7] * at)
    while done < at + num_tokens:
        guesses = speculator.guess(MOST_GUESSES)
        seconds = cost(1 + len(guesses)) * PLAIN_S
        num_right = next((n for n, each in enumerate(guesses) if each != 7), len(guesses))
        spent += seconds
        made[done - at] = len(guesses)
        if guesses:
            speculator.note_pass(PassCost(1 + len(guesses), seconds, 0), len(guesses), num_right)
        else:
            speculator.note_plain(PassCost(1, seconds, 0))
        for _ in range(1 + num_right):
            speculator.take(7)
        done += 1 + num_right
    return spent / PLAIN_S, made


def per_row(cost: float) -> Cost:
    return lambda num_rows: 1 + cost * (num_rows - 1)


@pytest.mark.parametrize("is_free", [True, False])
@pytest.mark.parametrize("cost", [0.1, 0.3, 0.6, 1.0])
def test_a_source_that_is_always_wrong_costs_under_three_percent(cost: float, is_free: bool) -> None:
    source = Scripted(lambda at: False, is_free=is_free)
    speculator = Speculator(source, PassCosts(), Counters())
    spent, _ = decode(speculator, 400, per_row(cost))
    assert spent < 400 * 1.03
    assert speculator.tally.num_right == 0 < speculator.tally.num_guessed


@pytest.mark.parametrize("is_free", [True, False])
def test_a_source_that_is_always_right_is_used(is_free: bool) -> None:
    speculator = Speculator(Scripted(lambda at: True, is_free=is_free), PassCosts(), Counters())
    spent, _ = decode(speculator, 400, per_row(0.1))
    assert 400 / spent > 3.5
    assert speculator.tally.gain(spent * PLAIN_S) == pytest.approx(400 / spent, rel=0.1)


ROW_COSTS = (1.0, 1.458, 1.828, 2.088, 2.453, 2.694, 3.07, 3.133)  # OLMoE, see results/2026-11-30-speculation-replay-*


def drawn(acceptance: float, seed: int) -> Callable[[int], bool]:
    draw = random.Random(seed)
    draws = [draw.random() < acceptance for _ in range(1000)]
    return draws.__getitem__


def gain(is_right: Callable[[int], bool], num_tokens: int, certainty: float = 1.0) -> float:
    source = Scripted(is_right, is_free=True)
    source.certainties = (certainty,)
    speculator = Speculator(source, PassCosts(), Counters())
    return num_tokens / decode(speculator, num_tokens, lambda num_rows: ROW_COSTS[num_rows - 1])[0]


def test_a_source_that_pays_is_not_locked_out_by_a_few_wrong_passes() -> None:
    """One pass of eight rows of which one counts loses 2.1 usual ones. The best fixed number of guesses gives 1.41."""
    gains = [gain(drawn(0.8, seed), 340) for seed in range(40)]
    assert sum(gains) / len(gains) > 1.29
    assert min(gains) > 1.05


@pytest.mark.parametrize("certainty", [0.5, 1.0])
def test_what_was_won_is_not_lost_again(certainty: float) -> None:
    """Once a source is wrong from now on, it costs three passes and 1.5% of all."""
    won = 100 / gain(lambda at: True, 100, certainty)
    lost = 260 / gain(lambda at: at < 100, 260, certainty) - won - 160
    assert 0 < lost < 3 + 0.015 * 260 + 0.5


@pytest.mark.parametrize("cost", [0.1, 0.6])
def test_two_sources_that_are_always_wrong_cost_little_more(cost: float) -> None:
    sources = [Scripted(lambda at: False, is_free=is_free) for is_free in (True, False)]
    speculator = Speculator(sources[0], PassCosts(), Counters(), beside=sources[1:])
    spent, _ = decode(speculator, 400, per_row(cost))
    assert spent < 400 * 1.035
    assert speculator.tally.num_guessed > 0


@pytest.mark.parametrize("number", [0, 1])
def test_of_two_sources_the_one_that_is_right_is_used(number: int) -> None:
    sources = [Scripted(lambda at, is_right=at == number: is_right, is_free=at == 0) for at in range(2)]
    speculator = Speculator(sources[0], PassCosts(), Counters(), beside=sources[1:])
    spent, _ = decode(speculator, 400, per_row(0.1))
    assert 400 / spent > 3


def test_of_two_sources_the_better_one_is_used_at_each_token() -> None:
    sources = [
        Scripted(lambda at: at < 300 and at % 2 == 0, is_free=True),
        Scripted(lambda at: at < 300 or at % 8 != 0, is_free=False),
    ]
    speculator = Speculator(sources[0], costs_with(1.3, 4), Counters(), beside=sources[1:])
    decode(speculator, 600, per_row(0.1))
    assert speculator.tally.num_right > 300


@pytest.mark.parametrize("is_free", [True, False])
def test_it_adapts_within_32_tokens(is_free: bool) -> None:
    source = Scripted(lambda at: at >= 200, is_free=is_free)
    _, made = decode(Speculator(source, costs_with(1.6, 4), Counters()), 400, per_row(0.2))
    assert sum(made[100:200]) <= 8
    assert any(made[200:233])
    assert sum(made[250:400]) > 60
    source = Scripted(lambda at: at < 200, is_free=is_free)
    _, made = decode(Speculator(source, costs_with(1.6, 4), Counters()), 400, per_row(0.2))
    assert sum(made[20:200]) > 80
    assert sum(made[232:400]) <= 20


class Drafting(Scripted):
    """Takes time for each token that came since its last guess beyond those that a guess takes along, and for each
    guess, in plain passes.
    """

    def __init__(
        self, is_right: Callable[[int], bool], clock: SimpleNamespace, *, to_catch_up: float, to_guess: float
    ) -> None:
        super().__init__(is_right, is_free=False)
        self._clock, self._to_catch_up, self._to_guess, self._behind = clock, to_catch_up, to_guess, 0

    def attach(self, cache: Any) -> None:
        pass

    def passing(self, first: int, ids: Sequence[int]) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, ids: Sequence[int]) -> None:
        super().begin(ids)
        self._behind = 0

    def take(self, token: int) -> None:
        super().take(token)
        self._behind += 1

    @property
    def num_behind(self) -> int:
        return self._behind if self._behind > MOST_GUESSES + 1 else 0

    def catch_up(self) -> None:
        self._clock.now += self._to_catch_up * self.num_behind * PLAIN_S
        self._behind = 0

    def guess(self, most: int) -> Guess:
        self.catch_up()
        self._clock.now += self._to_guess * most * PLAIN_S
        return super().guess(most)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of making guesses."""
    made = SimpleNamespace(now=0.0)
    made.perf_counter = lambda: made.now
    monkeypatch.setattr(speculator, "time", made)
    return made


def drafted(source: Drafting, clock: SimpleNamespace, num_tokens: int) -> tuple[float, list[int]]:
    """As `decode`, with the time of the draft."""
    spent, made = decode(Speculator(source, costs_with(1.6, 4), Counters()), num_tokens, per_row(0.2))
    return spent + clock.now / PLAIN_S, made


@pytest.mark.parametrize("good_from", [200, 1000])
@pytest.mark.parametrize(("to_catch_up", "within"), [(0.004, 36), (0.01, 64)])
def test_a_draft_that_catches_up_is_soon_used(
    good_from: int, to_catch_up: float, within: int, clock: SimpleNamespace
) -> None:
    """However long it was of no use, and though it computes all that came meanwhile before its first guess: after 32
    tokens, or once 1.5% of all passes cover the time.
    """
    source = Drafting(lambda at: at >= good_from, clock, to_catch_up=to_catch_up, to_guess=0.1)
    _, made = drafted(source, clock, good_from + 200)
    assert max(made[good_from : good_from + within]) > 1
    assert sum(made[good_from + within :]) > 100


@pytest.mark.parametrize("num_tokens", [160, 600])
@pytest.mark.parametrize("to_catch_up", [0.004, 0.015, 0.05])
def test_a_draft_that_is_always_wrong_costs_under_three_percent(
    to_catch_up: float, num_tokens: int, clock: SimpleNamespace
) -> None:
    source = Drafting(lambda at: False, clock, to_catch_up=to_catch_up, to_guess=0.1)
    spent, made = drafted(source, clock, num_tokens)
    assert num_tokens < spent < num_tokens * 1.03
    assert sum(made) >= 3


def test_a_draft_that_catches_up_slowly_is_tried_again_behind_the_next_prompt(clock: SimpleNamespace) -> None:
    """It has computed that along with the model."""
    source = Drafting(lambda at: at >= 500, clock, to_catch_up=0.05, to_guess=0.1)
    speculator = Speculator(source, PassCosts(), Counters())
    assert sum(decode(speculator, 500, per_row(0.2))[1][100:]) == 0
    assert sum(decode(speculator, 100, per_row(0.2), at=500)[1][:40]) > 10


def test_a_plain_pass_is_measured_now_and_then() -> None:
    costs = costs_with(1.2, 8)
    speculator = Speculator(Scripted(lambda at: True, is_free=True), costs, Counters())
    decode(speculator, 2_000, lambda num_rows: 2 * per_row(0.1)(num_rows))
    assert costs.plain_s > 1.5 * PLAIN_S


def test_counts_go_to_the_tally_and_to_the_model() -> None:
    counters = Counters()
    speculator = Speculator(Scripted(lambda at: at % 5 != 0, is_free=True), PassCosts(), counters)
    spent, _ = decode(speculator, 100, per_row(0.05))
    tally = speculator.tally
    assert (counters.num_guesses, counters.num_right_guesses) == (tally.num_guessed, tally.num_right)
    assert counters.saved_by_guesses_s == pytest.approx(tally.saved_s)
    assert tally.saved_s > 0
    assert 0 < tally.num_right < tally.num_guessed
    assert list(tally.acceptance) == sorted(tally.acceptance, reverse=True)
    counters.decode_s = spent * PLAIN_S
    assert counters.guess_gain == pytest.approx(tally.gain(spent * PLAIN_S))
    assert counters.guess_gain > 1
    speculator.begin([])
    assert speculator.tally == Tally()


def test_an_unknown_choice_is_refused() -> None:
    assert check_choice("ngram") == "ngram"
    with pytest.raises(ConfigError, match="Did you mean ngram"):
        check_choice("ngrams")


def test_prose_without_repeated_text_is_not_guessed_for_long() -> None:
    """Random text has short matches, whose guesses are wrong."""
    draw = random.Random(0)
    speculator = Speculator(NgramSource(), costs_with(1.5, 2), Counters())
    text = [draw.randrange(20) for _ in range(800)]
    speculator.begin(text[:200])
    for token in text[200:]:
        if not (guesses := speculator.guess(MOST_GUESSES)):
            speculator.note_plain(PassCost(1, PLAIN_S, 0))
        else:
            speculator.note_pass(PassCost(1 + len(guesses), PLAIN_S * (1 + 0.5 * len(guesses)), 0), len(guesses), 0)
        speculator.take(token)
    assert speculator.tally.num_passes < 0.05 * 600


@pytest.mark.parametrize("num_forced", [0, 2, 5])
def test_tokens_that_a_grammar_forced_are_no_loss_of_the_guesses(num_forced: int) -> None:
    """Their rows would have been computed without guesses, too."""
    costs, row = PassCosts(), per_row(0.5)
    speculator = Speculator(Scripted(lambda at: True, is_free=True), costs, Counters())
    speculator.note_plain(PassCost(1, PLAIN_S, 0))
    for num_rows in range(2, MOST_GUESSES + 2):
        costs.note(num_rows, row(num_rows) * PLAIN_S, 0)
    num_new, saved_s = 1 + num_forced, 1 * PLAIN_S - 0.5 * PLAIN_S  # one plain pass less, one row more
    speculator.note_pass(PassCost(num_new + 1, row(num_new + 1) * PLAIN_S, 0), num_guesses=1, num_right=1)
    assert speculator.tally.saved_s == pytest.approx(saved_s)


def trace_of(prompt: Sequence[int], answer: Sequence[int]) -> Trace:
    """Of several sequences that are alike; one layer of two experts."""
    ids = np.array([*prompt, *answer] * 2)
    is_prompt = np.array(([True] * len(prompt) + [False] * len(answer)) * 2)
    length = len(prompt) + len(answer)
    experts = np.zeros((2 * length, 1, 1), dtype=np.int16)
    return Trace(
        experts=experts, num_experts=2, sequence_lengths=np.array([length] * 2), token_ids=ids, is_prompt=is_prompt
    )


def test_a_recorded_answer_is_guessed_afterwards() -> None:
    found = guesses(trace_of([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 60, 61]))
    assert found is not None
    assert found.num_tokens == 14
    assert found.num_passes == 2 * 4  # 1 with a guess of 2; 3 with 4, 5 and wrong ones; 60; 61
    assert [(kind.least, kind.num_passes) for kind in found.kinds] == [(0.0, 2), (0.2, 2)]
    assert found.kinds[1].right == [1, 1, 0, 0, 0, 0, 0]
    assert guesses(trace_of([1, 2], [])) is None


def test_a_recorded_prompt_is_read_as_at_the_begin_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is learned from it, and its places are those of a prompt."""
    begun, taken = [], []
    begin, take = NgramSource.begin, NgramSource.take
    monkeypatch.setattr(NgramSource, "begin", lambda source, ids: (begun.append([*ids]), begin(source, ids))[1])
    monkeypatch.setattr(NgramSource, "take", lambda source, token: (taken.append(token), take(source, token))[1])
    assert guesses(trace_of([1, 2, 1, 2], [1, 3]))
    assert (begun, taken) == ([[1, 2, 1, 2]] * 2, [1, 3] * 2)


def shared(governor: RowGovernor, num_ready: int, num_tokens: int, cost: Cost) -> tuple[float, list[int]]:
    """Seconds of so many tokens of answers that are all ready, and the rows of each pass."""
    spent, made = 0.0, list[int]()
    while sum(made) < num_tokens:
        number = governor.choose(num_ready)
        seconds = PLAIN_S * cost(number)
        governor.note(number, seconds, 0)
        spent += seconds
        made.append(number)
    return spent, made


@pytest.mark.parametrize("gain", [1.2, 1.6, 3.0])
def test_rows_are_shared_while_that_pays(gain: float) -> None:
    spent, made = shared(RowGovernor(), 4, 4_000, lambda rows: max(1.0, rows / gain))
    assert spent < 4_000 * PLAIN_S / gain * 1.03
    assert made[0] == 1  # the first pass is measured
    assert 1 in made[10:200]  # and one again, now and then


@pytest.mark.parametrize("ratio", [0.96, 1.01, 1.3, 2.0, 5.0])
def test_where_sharing_does_not_pay_only_trials_cost(ratio: float) -> None:
    """Misses of several answers may cost more than their passes one after another."""
    spent, made = shared(RowGovernor(), 4, 4_000, lambda rows: rows * ratio if rows > 1 else 1.0)
    assert spent < 4_000 * PLAIN_S * 1.02
    assert 1 < max(made) <= 4


def test_sharing_stops_once_it_pays_no_more() -> None:
    governor = RowGovernor()
    _, before = shared(governor, 4, 1_000, lambda rows: 1 + 0.2 * (rows - 1))
    assert before[-1] == 4
    spent, after = shared(governor, 4, 2_000, lambda rows: rows * 1.4 if rows > 1 else 1.0)
    assert spent < 2_000 * PLAIN_S * 1.03
    assert after[-1] == 1
    _, again = shared(governor, 4, 2_000, lambda rows: 1 + 0.2 * (rows - 1))
    assert sum(again[-100:]) > 300


def test_no_number_of_rows_is_cheaper_than_one() -> None:
    governor = RowGovernor()
    for _ in range(24):
        governor.note(1, PLAIN_S * 3, 40)  # they waited for experts
    governor.note(4, PLAIN_S, 0)
    assert governor.rate(4) == pytest.approx(4)
    assert governor.pays
    for _ in range(20):
        governor.note(4, PLAIN_S * 12, 0)
    assert not governor.pays


def test_the_first_passes_which_read_every_expert_are_no_measure() -> None:
    governor = RowGovernor()
    for at in range(30):
        misses = max(0, 12 - at)
        governor.note(1, PLAIN_S * (1 + misses), misses)
        assert not misses or governor.choose(4) == 1
    assert governor.choose(4) == 4
    assert governor.rate(4) == pytest.approx(4 / 1.36)


def test_misses_that_rows_leave_behind_are_no_measure_either() -> None:
    """Rows seem to pay beside passes of one row that miss what the rows have evicted, and beside the first ones."""
    governor, spent, since_rows, made = RowGovernor(), 0.0, 0, list[int]()
    while sum(made) < 4_000:
        rows = governor.choose(4)
        since_rows = 0 if rows > 1 else since_rows + 1
        seconds = PLAIN_S * (5 if rows > 1 else 2 if since_rows < 12 else 1)
        governor.note(rows, seconds, 1)
        spent += seconds
        made.append(rows)
    assert 4 in made
    assert spent < 4_000 * PLAIN_S * 1.04


@pytest.mark.parametrize("every", [1, 3])
def test_noise_and_misses_do_not_end_what_pays(every: int) -> None:
    """Each pass has misses, or one in three; rows cost a fifth more, and times vary by 30%."""
    draw, governor, spent, made = random.Random(0), RowGovernor(), 0.0, list[int]()
    while sum(made) < 8_000:
        rows = governor.choose(3)
        num_misses = 3 if len(made) % every == 0 else 0
        seconds = PLAIN_S * (1 + 0.2 * (rows - 1) + 0.2 * num_misses) * draw.gauss(1, 0.3)
        governor.note(rows, max(seconds, 0.1 * PLAIN_S), num_misses)
        spent += seconds
        made.append(rows)
    alone = 8_000 * PLAIN_S * (1 + 0.6 / every)
    assert spent < 0.7 * alone


@pytest.mark.parametrize(("num_ready", "expected"), [(1, 1), (3, 3), (8, 8), (30, 8)])
def test_no_more_rows_than_a_pass_takes(num_ready: int, expected: int) -> None:
    _, made = shared(RowGovernor(), num_ready, 40, lambda rows: 1.0)
    assert max(made) == expected
