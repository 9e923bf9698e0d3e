"""The open loop's schedule on a virtual clock."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.pacing import OpenLoopSchedule
from headrace.bench.workload import arrival_times
from headrace.clock import VirtualClock


@given(
    rate=st.floats(0.5, 500),
    seed=st.integers(0, 100),
    turns=st.lists(st.floats(0, 0.5), max_size=40),
)
def test_whatever_the_turns_every_request_is_handed_out_once_in_order_and_not_early(
    rate: float, seed: int, turns: list[float]
) -> None:
    clock = VirtualClock(100.0)
    schedule = OpenLoopSchedule(arrival_times(rate, "poisson", seed), clock.now_s(), max_requests=50)
    handed_out = []
    for turn in [*turns, 1e6]:
        clock.advance(turn)
        for index, scheduled_s in schedule.due(clock.now_s()):
            assert scheduled_s <= clock.now_s()
            handed_out.append((index, scheduled_s))
        assert schedule.next_s is None or schedule.next_s > clock.now_s()
    expected = [100.0 + offset for offset in itertools.islice(arrival_times(rate, "poisson", seed), 50)]
    assert handed_out == list(enumerate(expected))


def test_a_late_caller_gets_all_missed_requests_with_their_own_times() -> None:
    schedule = OpenLoopSchedule(arrival_times(10.0, "fixed", 0), 5.0, max_requests=4)
    assert schedule.due(4.9) == []
    assert schedule.due(5.0) == [(0, 5.0)]
    assert schedule.due(9.0) == [(1, 5.1), (2, 5.2), (3, 5.3)]
    assert schedule.next_s is None
    assert schedule.due(99.0) == []


def test_a_duration_ends_the_schedule_before_its_last_instant() -> None:
    schedule = OpenLoopSchedule(arrival_times(2.0, "fixed", 0), 0.0, duration_s=1.0)
    assert schedule.due(10.0) == [(0, 0.0), (1, 0.5)]
    assert schedule.num_handed_out == 2


def test_the_first_of_both_ends_counts() -> None:
    schedule = OpenLoopSchedule(arrival_times(2.0, "fixed", 0), 0.0, duration_s=1.0, max_requests=1)
    assert schedule.due(10.0) == [(0, 0.0)]
