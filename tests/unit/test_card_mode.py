"""The way of a pass follows the time that both ways take, once their slots are their own."""

from collections.abc import Callable

import pytest

from offload_moe.card.mode import QUEUED, STEPWISE, TRIAL_EVERY, TRIAL_PASSES, ModeChoice

NUM_PASSES = 20 * TRIAL_EVERY[STEPWISE]


def stepwise_share(
    seconds: Callable[[bool, int], float], choice: ModeChoice, num_missed: int = 3, num_passes: int = NUM_PASSES
) -> float:
    """seconds: of a pass, stepwise or not, behind so many queued ones."""
    num_queued = num_stepwise = 0
    for _ in range(num_passes):
        is_stepwise = choice.choose()
        choice.measured(2 * seconds(is_stepwise, num_queued), 2, num_missed=num_missed, is_stepwise=is_stepwise)
        num_queued = 0 if is_stepwise else num_queued + 1
        num_stepwise += is_stepwise
    return num_stepwise / num_passes


@pytest.mark.parametrize("behind", [0, 1])
def test_queued_passes_are_judged_by_the_slots_that_they_renew(behind: int) -> None:
    """The first ones behind a prompt or a stepwise pass miss much."""
    share = stepwise_share(lambda is_stepwise, num: 1.2 if is_stepwise else 3.0 if num < behind else 1.0, ModeChoice())
    assert 0 < share < 0.03


def test_stepwise_passes_are_kept_where_they_are_faster() -> None:
    share = stepwise_share(lambda is_stepwise, num: 1.0 if is_stepwise else 3.0 if num < 2 else 1.1, ModeChoice())
    renewing = TRIAL_PASSES[QUEUED] / (TRIAL_EVERY[QUEUED] + TRIAL_PASSES[QUEUED])
    assert 1 - share == pytest.approx(renewing, abs=0.01)


def test_the_way_changes_when_the_times_do() -> None:
    choice = ModeChoice()
    assert stepwise_share(lambda is_stepwise, num: 2.0 if is_stepwise else 1.0, choice, num_passes=600) < 0.05
    assert stepwise_share(lambda is_stepwise, num: 0.5 if is_stepwise else 1.0, choice, num_passes=600) > 0.6
    choice = ModeChoice()
    assert stepwise_share(lambda is_stepwise, num: 1.0 if is_stepwise else 2.0, choice) > 0.8
    assert stepwise_share(lambda is_stepwise, num: 2.0 if is_stepwise else 1.0, choice) < 0.05


def test_a_way_that_becomes_slower_than_the_other_was_is_left_soon() -> None:
    choice = ModeChoice()
    assert stepwise_share(lambda is_stepwise, num: 2.0 if is_stepwise else 1.0, choice, num_passes=60) < 0.1
    assert stepwise_share(lambda is_stepwise, num: 2.0 if is_stepwise else 9.0, choice, num_passes=60) > 0.5


def test_passes_that_miss_nothing_are_queued() -> None:
    assert stepwise_share(lambda is_stepwise, num: 0.1 if is_stepwise else 1.0, ModeChoice(), num_missed=0) == 0


@pytest.mark.parametrize(("mode", "share"), [("queued", 0), ("stepwise", 1)])
def test_a_way_that_was_chosen_is_kept(mode: str, share: int) -> None:
    assert stepwise_share(lambda is_stepwise, num: 1.0 + (is_stepwise == share), ModeChoice(mode)) == share
