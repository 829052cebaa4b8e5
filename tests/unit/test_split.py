"""Who takes a miss, and what copies and experts are said to cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_moe.memory import pace
from offload_moe.memory.pace import LinkPace, RunningCost
from offload_moe.residency.split import SPLITS_BETWEEN_TRIALS, Balance


def balance(link: float | None, cpu: float | None) -> Balance:
    made = Balance(RunningCost())
    made.link.seconds, made.cpu.seconds = link, cpu
    return made


def test_before_anything_is_measured_misses_are_copied_then_one_is_tried_on_the_cpu() -> None:
    assert balance(None, None).split([3, 5]).copied == [3, 5]
    first = balance(0.01, None).split([3, 5], unread=[7])
    assert (first.on_cpu, first.copied) == ([3], [5, 7])


@pytest.mark.parametrize(
    ("link", "cpu", "num_on_cpu"), [(1.0, 1.0, 4), (1.0, 0.15, 7), (0.1, 1.0, 0), (1.0, 3.0, 2), (0.01, 5.0, 0)]
)
def test_the_quicker_side_takes_more(link: float, cpu: float, num_on_cpu: int) -> None:
    split = balance(link, cpu).split(range(8))
    assert len(split.on_cpu) == num_on_cpu
    assert sorted([*split.on_cpu, *split.copied]) == list(range(8))
    assert split.link_s == pytest.approx(link * len(split.copied))
    assert split.cpu_s == pytest.approx(cpu * len(split.on_cpu))


@given(num=st.integers(0, 12), link=st.floats(1e-5, 1), cpu=st.floats(1e-5, 1), busy=st.floats(0, 2))
def test_no_other_split_ends_earlier_by_more_than_a_rounding(num: int, link: float, cpu: float, busy: float) -> None:
    split = balance(link, cpu).split(range(num), busy_s=busy)

    def end(num_on_cpu: int) -> float:
        copied = num - num_on_cpu
        return max(num_on_cpu * cpu, (busy + copied * link) if copied else 0.0)

    assert end(len(split.on_cpu)) <= min(end(n) for n in range(num + 1)) * (1 + 1e-9) + 1e-12


def test_a_busy_link_and_what_it_brings() -> None:
    split = balance(1.0, 0.4).split([2], arriving=[1], busy_s=3.0)
    assert split.on_cpu == [1, 2]
    assert balance(1.0, 0.4).split([], arriving=[1], busy_s=0.3).on_cpu == []


def test_what_is_only_on_disk_goes_where_it_is_quicker() -> None:
    assert balance(1.0, 0.4).split([], unread=[1, 2, 3]).on_cpu == [1, 2, 3]
    assert balance(0.3, 0.4).split([], unread=[1, 2, 3]).copied == [1, 2, 3]


def test_a_cpu_that_lost_is_tried_again_after_a_while() -> None:
    made = balance(0.1, 5.0)
    assert not any(made.split([1]).on_cpu for _ in range(SPLITS_BETWEEN_TRIALS))
    assert made.split([1, 2]).on_cpu == [1]
    assert not made.split([1, 2]).on_cpu


def test_copies_that_queue_cost_the_time_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    link = LinkPace()
    assert link.busy_s() == 0.0
    first, second, third = link.begin(), link.begin(), link.begin()
    now = 12.0
    link.end([first])
    assert link.cost.seconds == 2.0
    now = 13.0
    assert link.busy_s() == pytest.approx(3.0)
    now = 14.0
    link.end([second])
    assert link.cost.seconds == 2.0
    link.fail(third)
    assert link.cost.seconds == 2.0
    assert link.busy_s() == 0.0


def test_copies_noticed_together_share_the_time_and_prefetches_end_no_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    link = LinkPace()
    began = [link.begin() for _ in range(4)]
    prefetch = link.begin()
    now = 16.0
    link.end(began)
    assert link.cost.seconds == pytest.approx(1.5)
    now = 17.5
    link.end([prefetch], are_demanded=False)
    assert link.cost.seconds == pytest.approx(1.5)
    assert (link.last_demanded_arrival, link.last_arrival) == (16.0, 17.5)
    assert link.busy_s() == 0.0
