"""Rollouts as a state machine: what each observation leads to, and that none leads anywhere unsafe."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.api.endpoint_config import Rollout
from headrace.policy import rollout
from headrace.policy.rollout import IDLE_STAGE_S, Outcomes, RolloutObservation, RolloutProgress, VersionView

NOTHING = Outcomes()
RULES = Rollout(traffic=[0.1, 0.5, 1.0], min_requests=20, stage_s=30.0, start_limit_s=100.0)


def seen(
    wanted: int = 4,
    *,
    old_ready: int = 4,
    new_ready: int = 0,
    old: Outcomes = NOTHING,
    new: Outcomes = NOTHING,
    num_open: int = 1,
    **new_version: Any,
) -> RolloutObservation:
    return RolloutObservation(
        wanted,
        VersionView(old_ready, outcomes=old),
        VersionView(new_ready, outcomes=new, **new_version),
        num_open=num_open,
    )


def started(rules: Rollout = RULES) -> RolloutProgress:
    """A rollout whose first replica is ready at second 10."""
    progress = rollout.decide(rollout.begin("a", "b", 0.0), seen(), rules, 5.0)
    return rollout.decide(progress, seen(new_ready=1), rules, 10.0)


def test_a_new_version_gets_no_request_before_it_is_ready_and_then_its_first_part() -> None:
    progress = rollout.begin("a", "b", 0.0)
    assert rollout.plan(progress, 4, RULES, 4) == rollout.RolloutPlan(4, 1, 0.0)
    progress = rollout.decide(progress, seen(), RULES, 1.0)
    assert rollout.plan(progress, 4, RULES, 4).traffic == 0.0
    assert "0 of 1 replicas are ready" in progress.reason
    assert rollout.plan(started(), 4, RULES, 4) == rollout.RolloutPlan(4, 1, 0.1)


def test_enough_good_requests_lead_through_all_stages_and_each_waits_for_its_replicas() -> None:
    progress = started()
    good = Outcomes(finished=20)
    progress = rollout.decide(progress, seen(new_ready=1, new=good), RULES, 12.0)
    assert rollout.plan(progress, 4, RULES, 4) == rollout.RolloutPlan(3, 2, 0.1)
    progress = rollout.decide(progress, seen(new_ready=2, new=good), RULES, 13.0)
    assert rollout.plan(progress, 4, RULES, 4) == rollout.RolloutPlan(3, 2, 0.5)
    good = Outcomes(finished=40)
    progress = rollout.decide(progress, seen(new_ready=2, new=good), RULES, 14.0)
    progress = rollout.decide(progress, seen(new_ready=4, new=good), RULES, 15.0)
    assert rollout.plan(progress, 4, RULES, 4) == rollout.RolloutPlan(1, 4, 1.0)
    progress = rollout.decide(progress, seen(new_ready=4, new=good), RULES, 16.0)
    assert progress.state == "running", "the last stage is judged, too"
    progress = rollout.decide(progress, seen(new_ready=4, new=Outcomes(finished=60)), RULES, 17.0)
    assert progress.state == "promoted"
    assert rollout.plan(progress, 4, RULES, 0) == rollout.RolloutPlan(0, 4, None)


def test_with_few_requests_a_stage_is_judged_when_its_time_is_over_and_with_none_sooner() -> None:
    few = Outcomes(finished=3)
    progress = rollout.decide(started(), seen(new_ready=1, new=few), RULES, 39.0)
    assert (progress.stage, "3 of 20 requests, or 1 s more" in progress.reason) == (0, True)
    assert rollout.decide(progress, seen(new_ready=1, new=few), RULES, 40.0).stage == 1
    idle = rollout.decide(started(), seen(new_ready=1, num_open=0), RULES, 10.0 + IDLE_STAGE_S)
    assert idle.stage == 1
    assert "nobody asked" in idle.reason


@pytest.mark.parametrize(
    ("new_version", "words"),
    [
        ({"is_hopeless": True, "last_error": "no such model"}, "cannot start: no such model"),
        ({"failures": 3, "last_error": "it crashed"}, "failed 3 times in a row: it crashed"),
    ],
)
def test_a_version_that_cannot_start_is_taken_back_with_its_error(
    new_version: dict[str, Any], words: str
) -> None:
    progress = rollout.decide(rollout.begin("a", "b", 0.0), seen(**new_version), RULES, 1.0)
    assert progress.state == "rolled_back"
    assert words in progress.reason
    assert rollout.plan(progress, 4, RULES, 4) == rollout.RolloutPlan(4, 0, None)


def test_a_version_that_is_never_ready_is_taken_back_after_its_limit() -> None:
    progress = rollout.begin("a", "b", 0.0)
    assert rollout.decide(progress, seen(), RULES, 99.9).state == "running"
    late = rollout.decide(progress, seen(), RULES, 100.0)
    assert late.state == "rolled_back"
    assert "rollout.start_limit_s" in late.reason


def test_one_failed_request_takes_no_version_back_and_three_of_twenty_do() -> None:
    for failed, state in ((1, "running"), (2, "running"), (3, "rolled_back")):
        new = Outcomes(finished=20 - failed, failed=failed)
        progress = rollout.decide(started(), seen(new_ready=1, new=new, old=Outcomes(100)), RULES, 11.0)
        assert progress.state == state, failed
    assert progress.reason == (
        "3 of 20 requests of the new version failed; 2.0% may (rollout.max_failed_ratio), the old version's "
        "were 0.0%: chance does that once in 141 times"
    )


@pytest.mark.parametrize("num_seen", [2, 3, 5])
def test_a_version_whose_requests_all_fail_goes_after_a_handful_without_waiting_for_its_stage(
    num_seen: int,
) -> None:
    broken = seen(new_ready=1, new=Outcomes(failed=num_seen), old=Outcomes(finished=100))
    progress = rollout.decide(started(), broken, RULES, 11.0)
    assert progress.state == "rolled_back"
    assert f"{num_seen} of {num_seen} requests of the new version failed" in progress.reason
    one = seen(new_ready=1, new=Outcomes(failed=1), old=Outcomes(finished=100))
    assert rollout.decide(started(), one, RULES, 11.0).state == "running"


def test_failing_as_often_as_the_old_version_is_not_the_new_ones_fault() -> None:
    old = Outcomes(finished=10, failed=30)
    both = seen(new_ready=1, new=Outcomes(finished=1, failed=4), old=old)
    assert rollout.decide(started(), both, RULES, 11.0).state == "running"
    worse = seen(new_ready=1, new=Outcomes(failed=30), old=old)
    assert "the old version's were 75.0%" in rollout.decide(started(), worse, RULES, 11.0).reason


def test_where_no_request_may_fail_one_is_enough() -> None:
    rules = RULES.model_copy(update={"max_failed_ratio": 0.0})
    new = Outcomes(finished=5, failed=1)
    assert rollout.decide(started(), seen(new_ready=1, new=new), rules, 11.0).state == "rolled_back"
    same = seen(new_ready=1, new=new, old=Outcomes(finished=50, failed=10))
    assert rollout.decide(started(), same, rules, 11.0).state == "running"


def test_what_no_single_stage_shows_all_of_them_together_do() -> None:
    progress = started()
    for stage in range(2):
        new = Outcomes(finished=18 * (stage + 1), failed=2 * (stage + 1))
        progress = rollout.decide(progress, seen(new_ready=4, new=new), RULES, 11.0)
        assert progress.state == ("running", "rolled_back")[stage]
        progress = rollout.decide(progress, seen(new_ready=4, new=new), RULES, 12.0)
    assert "4 of 40 requests of the new version failed" in progress.reason


@pytest.mark.slow  # 1.5 s: 300 rollouts at each rate
@pytest.mark.parametrize(("ratio", "least", "most"), [(0.005, 0, 3), (0.02, 0, 30), (0.15, 270, 300)])
def test_how_often_versions_are_taken_back_follows_how_often_their_requests_fail(
    ratio: float, least: int, most: int
) -> None:
    chance = Random(7)
    ends = [_run_to_its_end(lambda: chance.random() < ratio) for _ in range(300)]
    assert least <= ends.count("rolled_back") <= most


def _run_to_its_end(fails: Callable[[], bool]) -> str:
    """Show a rollout one request after another, all replicas ready, until it is decided."""
    progress, now_s = started(), 10.0
    finished = failed = 0
    while progress.is_open:
        is_failed = fails()
        failed, finished, now_s = failed + is_failed, finished + (not is_failed), now_s + 0.1
        new = Outcomes(finished=finished, failed=failed)
        progress = rollout.decide(progress, seen(new_ready=4, new=new, old=Outcomes(50)), RULES, now_s)
    return progress.state


def test_requests_beyond_the_slo_take_it_back_when_the_old_versions_are_not() -> None:
    slow = Outcomes(finished=20, slow_itl=11)
    progress = rollout.decide(
        started(), seen(new_ready=1, new=slow, old=Outcomes(100, 0, 0, 10)), RULES, 11.0
    )
    assert progress.state == "rolled_back"
    assert progress.reason == (
        "11 of the new version's 20 requests were beyond slo.itl_ms, 10% of the old version's; 20% more may "
        "be (rollout.max_slow_ratio): chance does that once in 58 times"
    )
    same = seen(new_ready=1, new=slow, old=Outcomes(100, 0, 0, 40))
    assert rollout.decide(started(), same, RULES, 11.0).stage == 1
    few = seen(new_ready=1, new=Outcomes(finished=3, slow_ttft=1), old=Outcomes(100), num_open=0)
    assert rollout.decide(started(), few, RULES, 60.0).stage == 1, "one of three is no proof"


def test_at_zero_it_waits_for_the_next_start_and_without_old_replicas_it_needs_no_canary() -> None:
    progress = rollout.begin("a", "b", 0.0)
    progress = rollout.decide(progress, seen(0, old_ready=0), RULES, 5000.0)
    assert progress.state == "running"
    assert rollout.plan(progress, 1, RULES, 0) == rollout.RolloutPlan(0, 1, None)
    progress = rollout.decide(progress, seen(1, old_ready=0), RULES, 5001.0)
    assert rollout.decide(progress, seen(1, old_ready=0, new_ready=1), RULES, 5002.0).state == "promoted"
    broken = seen(1, old_ready=0, is_hopeless=True)
    assert rollout.plan(rollout.decide(progress, broken, RULES, 5002.0), 1, RULES, 0).old_count == 1


def test_with_room_for_one_the_versions_swap() -> None:
    rules = RULES.model_copy(update={"surge": 0})
    progress = rollout.begin("a", "b", 0.0)
    assert rollout.plan(progress, 1, rules, 1) == rollout.RolloutPlan(0, 1, None)
    progress = rollout.decide(progress, seen(1, old_ready=0, new_ready=1), rules, 3.0)
    assert progress.state == "promoted"
    assert rollout.plan(rollout.begin("a", "b", 0.0), 3, rules, 3) == rollout.RolloutPlan(2, 1, 0.0)


def test_an_old_version_that_dies_in_the_middle_proves_nothing_of_the_new_one() -> None:
    progress = rollout.decide(started(), seen(old_ready=0, new_ready=1), RULES, 11.0)
    assert (progress.state, progress.stage) == ("running", 0)


def test_paused_it_stays_as_it_is_and_resumed_its_stage_begins_anew() -> None:
    paused = rollout.pause(started(), 11.0)
    bad = seen(new_ready=1, new=Outcomes(failed=9), is_hopeless=True)
    assert rollout.decide(paused, bad, RULES, 5000.0) == paused
    assert rollout.plan(paused, 4, RULES, 4) == rollout.RolloutPlan(4, 1, 0.1)
    resumed = rollout.resume(paused, Outcomes(failed=9), 5000.0)
    after = rollout.decide(resumed, seen(new_ready=1, new=Outcomes(finished=3, failed=9)), RULES, 5001.0)
    assert (after.state, after.stage) == ("running", 0)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Rollout, list[RolloutObservation]]:
    traffic = [*sorted(draw(st.sets(st.sampled_from([0.1, 0.3, 0.5, 0.9]), max_size=3))), 1.0]
    rules = Rollout(
        traffic=traffic,
        surge=draw(st.integers(0, 2)),
        min_requests=draw(st.integers(0, 5)),
        stage_s=draw(st.sampled_from([0.0, 2.0, 5.0])),
        start_limit_s=10.0,
    )
    outcomes = st.builds(Outcomes, *[st.integers(0, 30)] * 4)
    version = st.builds(
        VersionView, st.integers(0, 4), st.integers(0, 4), st.booleans(), st.just("it broke"), outcomes
    )
    observation = st.builds(
        RolloutObservation, st.integers(0, 4), version, version, st.integers(0, 9), st.integers(0, 3)
    )
    return rules, draw(st.lists(observation, max_size=25))


@settings(deadline=None)
@given(history=histories())
def test_whatever_is_seen_parts_and_counts_stay_within_bounds_and_what_ended_stays_ended(
    history: tuple[Rollout, list[RolloutObservation]],
) -> None:
    rules, observations = history
    progress = rollout.begin("a", "b", 0.0)
    has_been_ready = False
    for number, observation in enumerate(observations):
        before = progress
        progress = rollout.decide(progress, observation, rules, float(number))
        wanted = observation.num_wanted
        planned = rollout.plan(progress, wanted, rules, observation.old.num_ready)
        has_been_ready |= observation.new.num_ready > 0
        assert planned.old_count + planned.new_count <= wanted + rules.surge
        assert planned.old_count + planned.new_count >= wanted
        assert min(planned.old_count, planned.new_count) >= 0
        if planned.traffic:
            assert has_been_ready, "a part of the requests before any replica was ready"
            assert planned.traffic <= rules.traffic[progress.stage]
        if not before.is_open:
            assert progress == before
        if progress.state == "promoted":
            assert has_been_ready
        assert progress.stage - before.stage <= 1
        assert progress.reason
