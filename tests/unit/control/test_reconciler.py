"""The reconciler's promises, one by one and over random fleets and histories."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.control.fleet_world import (
    NOW_S,
    World,
    crashed,
    desired,
    fleets,
    ready,
    starting,
    starts,
    stops,
    wishes,
)

from headrace.control.reconciler import (
    DesiredEndpoint,
    ForgetReplica,
    PromoteReplica,
    RestReplica,
    StartReplica,
    StopReplica,
    reconcile,
)
from headrace.control.slots import (
    FAILED_RETRY_S,
    LOST_AFTER_S,
    MAX_FAST_FAILURES,
    ObservedReplica,
    count_failures,
    lowest_free_id,
    phase_of,
    restart_delay_s,
    slot_prefix,
)


def test_an_empty_fleet_is_started_with_the_lowest_ids() -> None:
    actions = reconcile([desired(3)], [], NOW_S)
    assert starts(actions) == ["chat-1", "chat-2", "chat-3"]
    assert all(action.reason for action in actions)


def test_nothing_is_started_while_starts_are_held_off_and_nothing_is_given_up_for_it() -> None:
    held_off = replace(desired(3, standby=1), hold_off="the machine goes")
    assert reconcile([held_off], [ready("chat-1"), crashed("chat-2", 1, 0.0)], NOW_S) == []
    assert len(starts(reconcile([replace(held_off, hold_off="")], [ready("chat-1")], NOW_S))) == 3
    # With room for one only, the old version is not taken away for a new one that may not come.
    swap = replace(desired(1, surge=0), hold_off="the machine goes")
    assert reconcile([swap], [ready("chat-1", generation="old")], NOW_S) == []
    assert stops(reconcile([desired(1, surge=0)], [ready("chat-1", generation="old")], NOW_S)) == ["chat-1"]


def test_a_freed_id_is_used_again() -> None:
    assert starts(reconcile([desired(3)], [ready("chat-1"), ready("chat-3")], NOW_S)) == ["chat-2"]


def test_nothing_is_done_when_what_is_seen_is_what_is_wanted() -> None:
    assert reconcile([desired(2)], [ready("chat-1"), ready("chat-2")], NOW_S) == []


def test_scaling_down_takes_failed_then_starting_then_idle_then_newest() -> None:
    fleet = [
        ready("chat-1", num_open=3),
        ready("chat-2", num_open=1, started_s=5),
        ready("chat-3", num_open=1, started_s=9),
        starting("chat-4"),
        crashed("chat-5", MAX_FAST_FAILURES, NOW_S),
    ]
    order: list[str] = []
    for count in (4, 3, 2, 1, 0):
        actions = reconcile([desired(count)], fleet, NOW_S)
        assert len(actions) == 1
        assert isinstance(actions[0], StopReplica | ForgetReplica)
        order.append(actions[0].replica_id)
        fleet = [replica for replica in fleet if replica.replica_id != order[-1]]
    assert order == ["chat-5", "chat-4", "chat-3", "chat-2", "chat-1"]


def test_a_replica_whose_lease_ended_goes_before_one_that_serves_and_is_none_of_those_that_are_enough() -> (
    None
):
    silent = replace(ready("chat-1", num_open=9), lease_ends_s=NOW_S - 1)
    assert stops(reconcile([desired(1)], [silent, ready("chat-2")], NOW_S)) == ["chat-1"]
    fleet = [replace(silent, generation="old"), ready("chat-2", generation="old"), ready("chat-3")]
    assert stops(reconcile([desired(2)], fleet, NOW_S)) == ["chat-1"]


def test_replicas_that_all_fell_silent_at_once_are_still_needed() -> None:
    """It was the controller that stood still: their reports are on the way."""
    fleet = [replace(ready(f"chat-{n}", generation="old"), lease_ends_s=NOW_S - 4) for n in (1, 2)]
    assert stops(reconcile([desired(2)], [*fleet, starting("chat-3")], NOW_S)) == []


def test_the_replica_whose_loss_costs_least_goes_and_the_reason_says_so() -> None:
    fleet = [
        replace(ready("chat-1", num_open=1), lost_tokens=900.0),
        replace(ready("chat-2", num_open=4), lost_tokens=400.0),
        ready("chat-3", started_s=5.0, num_open=5),
    ]
    (action,) = reconcile([desired(2)], fleet, NOW_S)
    assert (action.replica_id, "costs least: 5 open, 0 tokens in demand" in action.reason) == ("chat-3", True)
    fleet[0] = replace(fleet[0], is_leaving=True)
    (action,) = reconcile([desired(2)], fleet, NOW_S)
    assert action.replica_id == "chat-1", "its machine goes anyway"


def test_a_serving_replica_gets_its_drain_grace_and_a_starting_one_does_not() -> None:
    actions = reconcile(
        [desired(0)], [replace(ready("chat-1"), drain_grace_s=77.0), starting("chat-2")], NOW_S
    )
    grace = {action.replica_id: action.grace_s for action in actions if isinstance(action, StopReplica)}
    assert grace == {"chat-1": 77.0, "chat-2": 1.0}


def test_a_removed_endpoint_is_drained() -> None:
    (action,) = reconcile([desired(1, name="other")], [ready("chat-1")], NOW_S)[:1]
    assert isinstance(action, StopReplica)
    assert action.grace_s == 30.0
    assert "removed" in action.reason


def test_a_hung_replica_is_killed_after_its_lease_and_a_limit_and_keeps_its_slot() -> None:
    hung = replace(ready("chat-1"), lease_ends_s=NOW_S - LOST_AFTER_S)
    assert reconcile([desired(1)], [hung], NOW_S) == []
    (action,) = reconcile([desired(1)], [hung], NOW_S + 0.1)
    assert isinstance(action, StopReplica)
    assert (action.grace_s, action.is_failure) == (0.0, True)
    stopping = replace(hung, is_stopping=True, keeps_slot=True)
    assert reconcile([desired(1)], [stopping], NOW_S + 0.2) == []


def test_a_replica_that_reports_failed_is_stopped_with_its_own_words() -> None:
    failed = replace(starting("chat-1"), report_state="failed", last_error="no such model")
    (action,) = reconcile([desired(1)], [failed], NOW_S)
    assert isinstance(action, StopReplica)
    assert action.is_failure
    assert action.reason == "no such model"


def test_a_crashed_slot_waits_for_its_back_off_and_no_other_slot_takes_its_place() -> None:
    slot = crashed("chat-1", 3, NOW_S)
    assert reconcile([desired(1)], [slot], NOW_S + 1.9) == []
    assert starts(reconcile([desired(1)], [slot], NOW_S + 2.0)) == ["chat-1"]


@pytest.mark.parametrize(
    "slot", [crashed("chat-1", MAX_FAST_FAILURES, NOW_S), crashed("chat-1", 1, NOW_S, is_retryable=False)]
)
def test_a_crash_loop_and_a_hopeless_failure_are_failed_and_retried_slowly(slot: ObservedReplica) -> None:
    assert phase_of(slot, NOW_S) == "failed"
    assert reconcile([desired(1)], [slot], NOW_S + FAILED_RETRY_S - 0.1) == []
    assert starts(reconcile([desired(1)], [slot], NOW_S + FAILED_RETRY_S)) == ["chat-1"]


def test_delays_double_from_half_a_second_to_thirty() -> None:
    assert [restart_delay_s(failures) for failures in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_minute_of_health_ends_a_series_of_failures() -> None:
    healthy = replace(ready("chat-1", started_s=NOW_S - 60), failures=4)
    assert count_failures(healthy, NOW_S) == 1
    assert count_failures(healthy, NOW_S - 1) == 5


def test_a_changed_config_starts_before_it_stops() -> None:
    old = [ready("chat-1", generation="old"), ready("chat-2", generation="old")]
    actions = reconcile([desired(2)], old, NOW_S)
    assert starts(actions) == ["chat-3"]
    assert stops(actions) == []
    assert reconcile([desired(2)], [*old, starting("chat-3")], NOW_S) == []
    actions = reconcile([desired(2)], [*old, ready("chat-3")], NOW_S)
    assert len(stops(actions)) == 1
    assert stops(actions)[0] in ("chat-1", "chat-2")


def test_a_new_config_that_never_gets_ready_leaves_the_old_replicas_alone() -> None:
    fleet = [ready("chat-1", generation="old"), crashed("chat-2", MAX_FAST_FAILURES, NOW_S)]
    assert reconcile([desired(1)], fleet, NOW_S + 1) == []


def test_a_standby_that_starts_is_not_taken_for_a_serving_one_while_none_may_be_started() -> None:
    """The second of two turns at one moment started one more standby than the first."""
    fleet = [
        ready("chat-1"),
        ready("chat-3"),
        ready("chat-4", generation="old"),
        crashed("chat-6", 1, NOW_S, is_retryable=False),
        replace(ready("chat-7"), role="standby", report_state="standby", can_change=True),
    ]
    world, wish = (
        World({replica.replica_id: replica for replica in fleet}),
        desired(4, maximum=6, standby=2, surge=0),
    )
    actions = reconcile([wish], fleet, NOW_S)
    assert starts(actions) == ["chat-2"]
    world.apply(actions)
    assert reconcile([wish], list(world.replicas.values()), NOW_S) == []


def test_replica_ids_are_safe_and_differ_between_endpoints() -> None:
    names = ["chat", "qwen/qwen3:0.6b", "qwen-qwen3-0.6b", "qwen:qwen3/0.6b", "a" * 128, "a" * 127]
    prefixes = [slot_prefix(name) for name in names]
    assert len(set(prefixes)) == len(names)
    assert all("/" not in prefix and ":" not in prefix and len(prefix) < 60 for prefix in prefixes)
    assert lowest_free_id("chat", {"chat-1", "chat-3"}) == "chat-2"


@pytest.mark.slow
@settings(deadline=None)
@given(fleet=fleets, wish=wishes())
def test_any_fleet_converges_to_what_is_wanted_and_then_nothing_is_done(
    fleet: list[ObservedReplica], wish: DesiredEndpoint
) -> None:
    world = World({replica.replica_id: replica for replica in fleet})
    num_quiet = 0
    for _ in range(1000):
        actions = reconcile([wish], list(world.replicas.values()), world.now_s)
        # A failed slot is retried a minute after it stopped, so only a longer silence is the end.
        num_quiet = 0 if actions else num_quiet + 1
        if num_quiet > 2 * FAILED_RETRY_S:
            break
        world.apply(actions)
        world.advance(1.0)
    live = list(world.replicas.values())
    serving = [replica.generation for replica in live if replica.role == "serving"]
    standby = [replica.generation for replica in live if replica.role == "standby"]
    assert {version.generation: version.count for version in wish.versions if version.count} == Counter(
        serving
    )
    assert standby == ["new"] * wish.num_standby
    assert all(replica.endpoint == "chat" for replica in live)
    assert world.num_ready() == len(serving)
    assert reconcile([wish], live, world.now_s) == []


@pytest.mark.slow
@settings(deadline=None)
@given(fleet=fleets, wish=wishes())
def test_one_turn_never_takes_a_ready_replica_that_is_needed_nor_starts_too_many(
    fleet: list[ObservedReplica], wish: DesiredEndpoint
) -> None:
    world = World({replica.replica_id: replica for replica in fleet})
    needed = wish.count if wish.surge else max(wish.count - 1, 0)
    for _ in range(20):
        observed = list(world.replicas.values())
        ready_before = world.num_ready()
        alive_before = sum(r.is_alive and r.endpoint == "chat" for r in observed)
        actions = reconcile([wish], observed, world.now_s)
        world.apply(actions)
        assert world.num_ready() >= min(ready_before, needed)
        alive = sum(r.is_alive and r.endpoint == "chat" for r in world.replicas.values())
        assert alive <= max(alive_before, wish.max_count + wish.surge)
        again = reconcile([wish], list(world.replicas.values()), world.now_s)
        told = (PromoteReplica, RestReplica, StartReplica, StopReplica)
        repeated = [action for action in again if isinstance(action, told)]
        assert not repeated, f"the same moment asks for more than {actions} of {observed}"
        world.advance(0.2)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(lives=st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_restarts_of_a_crashing_replica_are_bounded_in_rate(lives: list[int]) -> None:
    """Whatever it does, a slot that never gets healthy starts at most 5 times fast, then once a minute."""
    world = World({})
    start_times: list[float] = []
    life = 0
    for _ in range(3000):
        actions = reconcile([desired(1)], list(world.replicas.values()), world.now_s)
        start_times += [world.now_s] * len(starts(actions))
        world.apply(actions)
        for replica_id, replica in list(world.replicas.items()):
            if replica.is_alive and world.now_s - replica.started_s >= lives[life % len(lives)]:
                world.crash(replica_id)
                life += 1
        world.now_s += 0.2
    elapsed_s = 3000 * 0.2
    assert len(start_times) <= MAX_FAST_FAILURES + elapsed_s / FAILED_RETRY_S + 1
    gaps = [later - earlier for earlier, later in pairwise(start_times)]
    assert all(
        gap >= restart_delay_s(min(index + 1, MAX_FAST_FAILURES)) - 0.01 for index, gap in enumerate(gaps)
    )
