"""Replicas that keep waits within bounds, and the forecast they are asked for ahead of."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.scaling_forecast import MAX_GROWTH, NUM_PARTS, forecast, window_s
from headrace.policy.scaling_queue import late_ratio, replicas_within


@given(demand=st.floats(0.01, 200), dispersion_s=st.floats(0.001, 60), slack_s=st.floats(0.01, 60))
def test_the_least_number_keeps_the_bound_and_little_less_does_not(
    demand: float, dispersion_s: float, slack_s: float
) -> None:
    count = replicas_within(demand, dispersion_s, slack_s, 0.01)
    assert count >= demand
    assert late_ratio(count, demand, dispersion_s, slack_s) <= 0.0101
    less = demand + 0.9 * (count - demand)
    assert late_ratio(less, demand, dispersion_s, slack_s) > 0.0099


@given(demand=st.floats(0, 100), more=st.floats(0, 100), dispersion_s=st.floats(0, 10))
def test_more_demand_never_needs_fewer(demand: float, more: float, dispersion_s: float) -> None:
    counts = [replicas_within(each, dispersion_s, 1.0, 0.01) for each in (demand, demand + more)]
    assert counts[0] <= counts[1] + 0.01


def test_nothing_waits_without_demand_and_everything_without_room() -> None:
    assert late_ratio(1, 0, 1, 1) == 0
    assert late_ratio(1, 2, 1, 1) == 1
    assert late_ratio(2, 1, 0, 1) == 0
    assert replicas_within(0, 1, 1, 0.01) == 0
    assert replicas_within(3, 0, 1, 0.01) == 3


@pytest.mark.slow
@pytest.mark.parametrize("demand", [0.8, 3.0, 8.0])
def test_a_simulated_queue_of_such_size_keeps_the_bound(demand: float) -> None:
    """Poisson arrivals, exponential service of one second: dispersion 2 s."""
    slack_s, seed = 1.5, 11
    count = -(-replicas_within(demand, 2.0, slack_s, 0.01) // 1)
    rng = random.Random(seed)
    free = [0.0] * int(count)
    now_s, late, number = 0.0, 0, 60_000
    for _ in range(number):
        now_s += rng.expovariate(demand)
        start_s = max(now_s, heapq.heappop(free))
        heapq.heappush(free, start_s + rng.expovariate(1.0))
        late += start_s - now_s > slack_s
    assert late / number < 0.015, f"seed {seed}"


def test_a_steady_trend_is_continued_over_the_horizon_and_bounded() -> None:
    seconds = window_s(60.0)
    part_s = seconds / NUM_PARTS
    parts = [1.0 + 0.01 * part_s * (index + 0.5) for index in range(NUM_PARTS)]
    now = 1.0 + 0.01 * seconds
    assert forecast(parts, now, 60.0).value == pytest.approx(now + 0.6, rel=0.05)
    steep = [0.0] * 4 + [1.0] * 4 + [50.0] * 4
    assert forecast(steep, 10.0, 60.0).value == 10.0 * (1 + MAX_GROWTH)


@given(parts=st.lists(st.floats(0, 1000), max_size=NUM_PARTS), now=st.floats(0, 1000))
def test_a_forecast_is_never_below_now_nor_above_its_bound(parts: list[float], now: float) -> None:
    assert now <= forecast(parts, now, 60.0).value <= now * (1 + MAX_GROWTH)


def test_a_single_burst_makes_no_trend() -> None:
    parts = [1.0] * NUM_PARTS
    parts[9] = 100.0
    assert forecast(parts, 1.0, 60.0).value == 1.0
