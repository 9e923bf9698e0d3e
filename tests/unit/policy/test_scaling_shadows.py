"""Shadow fleets: each learns what its rule would have cost, and the cheapest that suffices is taken."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.scaling_recent import Largest
from headrace.policy.scaling_shadows import MARGINS, MAX_SAMPLES, Choice, Sample, ShadowFleets, Terms

TERMS = Terms(window_s=60.0, start_s=60.0, slack_s=2.0, min_count=1, max_count=1000)


def learn(
    demand: Callable[[int], float], seconds: int, terms: Terms = TERMS, shadows: ShadowFleets | None = None
) -> Choice:
    """Watch a demand, in full replicas, second by second; its level is the mean of the last half minute."""
    shadows = shadows or ShadowFleets()
    last: list[float] = []
    for second in range(seconds):
        work_s = demand(second)
        last = [*last[-29:], work_s]
        shadows.observe(Sample(work_s, 10 * work_s, sum(last) / len(last), 1.0), terms, second + 1.0)
    choice = shadows.choose(0.99, terms)
    assert choice is not None
    return choice


def test_nothing_is_said_before_anything_could_be_late() -> None:
    shadows = ShadowFleets()
    assert shadows.choose(0.99, TERMS) is None
    shadows.observe(Sample(1.0, 1.0, 1.0, 1.0), TERMS, 1.0)
    assert shadows.choose(0.99, TERMS) is None


def test_demand_that_never_changes_needs_no_room() -> None:
    choice = learn(lambda _: 9.9, 700)
    assert (choice.margin, choice.hold_s, choice.late_ratio) == (0.0, 60.0, 0.0)
    assert choice.count == pytest.approx(9.9, abs=0.1)
    assert choice.cost_ratio == pytest.approx(10 / 9.9, rel=0.01)
    assert choice.is_mature


def test_a_short_watch_is_not_mature() -> None:
    assert not learn(lambda _: 9.9, 590).is_mature


@pytest.mark.slow
def test_demand_that_keeps_rising_within_a_start_teaches_room_for_it_and_not_much_more() -> None:
    """A quarter more every other ten minutes: who asks for no more is late for a minute each time."""
    choice = learn(lambda second: 12.5 if second % 1200 >= 600 else 10.0, 12_000)
    assert choice.late_ratio <= 0.01
    assert 1.0 < choice.cost_ratio * 11.25 / 13 <= 1.06, "a fixed fleet of 13 is the cheapest there is"


@pytest.mark.slow
def test_bursts_that_are_over_before_a_replica_starts_are_met_by_replicas_that_stay() -> None:
    seed = 3
    rng = random.Random(seed)
    bursts = {start + offset for start in range(300, 20_000, 300) for offset in range(10)}
    choice = learn(lambda second: 20.0 if second in bursts else rng.uniform(1, 2), 20_000)
    assert choice.late_ratio <= 0.01, f"seed {seed}"
    assert choice.hold_s > 60.0
    assert choice.count >= 12


def test_what_was_late_by_every_rule_speaks_for_none() -> None:
    """No fleet may have more than two replicas: the dearest rule is no better than the cheapest."""
    choice = learn(lambda _: 5.0, 700, replace(TERMS, max_count=2))
    assert (choice.margin, choice.hold_s, choice.late_ratio) == (0.0, 60.0, 0.0)


def test_a_higher_attainment_never_takes_a_cheaper_rule() -> None:
    shadows, seed = ShadowFleets(), 5
    rng = random.Random(seed)
    learn(lambda second: rng.gammavariate(10, 1) * (2 if second % 200 > 150 else 1), 1500, shadows=shadows)
    costs = []
    for ratio in (0.5, 0.9, 0.95, 0.99, 0.999):
        choice = shadows.choose(ratio, TERMS)
        assert choice is not None
        costs.append(choice.cost_ratio)
    assert costs == sorted(costs), f"seed {seed}"
    assert costs[-1] > costs[0]


@pytest.mark.slow
def test_what_was_learned_fades_over_days() -> None:
    shadows = ShadowFleets()
    wild = learn(lambda second: 12.5 if second % 1200 >= 600 else 10.0, 9_000, shadows=shadows)
    assert wild.margin > 0 or wild.hold_s > 60
    for day_minute in range(5 * 1440):
        shadows.observe(Sample(600.0, 6000.0, 10.0, 60.0), TERMS, 9_000 + 60.0 * (day_minute + 1))
    calm = shadows.choose(0.99, TERMS)
    assert calm is not None
    assert (calm.margin, calm.hold_s) == (0.0, 60.0)


def test_sums_stay_finite_over_months_and_memory_bounded() -> None:
    shadows = ShadowFleets()
    for hour in range(3000):
        shadows.observe(Sample(7200.0, 100.0, 2.0, 3600.0), TERMS, 3600.0 * (hour + 1))
    choice = shadows.choose(0.99, TERMS)
    assert choice is not None
    assert choice.cost_ratio == pytest.approx(1.0, rel=0.01)
    for second in range(MAX_SAMPLES + 10):
        shadows.observe(Sample(1.0, 1.0, 1.0, 1e-3), replace(TERMS, slack_s=1e6), 1.1e7 + second / 1000)
    assert len(shadows._unjudged) == MAX_SAMPLES


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 20)), min_size=1, max_size=60))
def test_the_choice_is_one_of_the_rules_whatever_arrives(samples: list[tuple[float, float]]) -> None:
    shadows, now_s = ShadowFleets(), 0.0
    for work_s, step_s in samples:
        now_s += step_s
        shadows.observe(Sample(work_s, work_s, work_s / step_s, step_s), TERMS, now_s)
    choice = shadows.choose(0.99, TERMS)
    if choice is not None:
        assert choice.margin in MARGINS
        assert 0 <= choice.late_ratio <= 1
        assert choice.count >= 0


@given(
    values=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=80),
    window_s=st.floats(0, 40),
)
def test_the_largest_of_a_window_is_what_looking_at_all_of_it_gives(
    values: list[tuple[float, float]], window_s: float
) -> None:
    largest, now_s, seen = Largest(), 0.0, []
    for value, step_s in values:
        now_s += step_s
        seen.append((now_s, value))
        expected = max(value for at_s, value in seen if at_s >= now_s - window_s)
        assert expected <= largest.add(value, now_s, window_s) <= expected + 1 / 32
        assert largest.value >= expected


def test_the_largest_of_a_window_is_kept_in_little_memory() -> None:
    largest = Largest()
    for step in range(10_000):
        largest.add(10.0 - step / 1000, step, 1e9)
    assert len(largest) <= 32 * 10 + 1
