"""Who leaves a drained node, and when. With the reconciler, which starts what replaces them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from headrace.api.messages import NodeState
from headrace.control.evacuation import evacuate
from headrace.control.node_drains import NodeDrains
from headrace.control.reconciler import (
    DesiredEndpoint,
    LeaveReplica,
    PromoteReplica,
    StartReplica,
    StopReplica,
    WantedVersion,
    reconcile,
)
from headrace.control.slots import ObservedReplica

NOW_S = 100.0


def replica(number: int, node: str = "a", **fields: Any) -> ObservedReplica:
    base = ObservedReplica(f"chat-{number}", "chat", "v", True, False, 0.0, NOW_S + 3.0, "ready", 50.0)
    return replace(base, node=node, is_node_draining=node == "a", **fields)


def wanted(count: int, **fields: Any) -> DesiredEndpoint:
    base = DesiredEndpoint("chat", count, 4, (WantedVersion("v", count),), standby_generation="v")
    return replace(base, **fields)


def drains(left_s: float = 60.0) -> NodeDrains:
    noted = NodeDrains()
    node = NodeState("a", "10.0.0.1", is_draining=True, drain_deadline_s=1000.0 + left_s)
    noted.note([node], NOW_S, 1000.0)
    return noted


def leaves(
    desired: DesiredEndpoint, *replicas: ObservedReplica, left_s: float = 60.0, now_s: float = NOW_S
) -> list[str]:
    observed = [replace(one, lease_ends_s=max(one.lease_ends_s, now_s + 1)) for one in replicas]
    actions = evacuate([desired], observed, drains(left_s), now_s)
    return [action.replica_id for action in actions if isinstance(action, LeaveReplica)]


def test_one_is_started_elsewhere_and_the_one_that_leaves_serves_until_it_is_ready() -> None:
    desired, leaving = wanted(1), replica(1)
    (start,) = reconcile([desired], [leaving], NOW_S)
    assert isinstance(start, StartReplica)
    assert start.replica_id == "chat-2"
    assert leaves(desired, leaving) == []
    starting = replica(2, "b", report_state="starting")
    assert reconcile([desired], [leaving, starting], NOW_S) == []
    assert leaves(desired, leaving, starting) == []
    ready = replica(2, "b")
    assert leaves(desired, leaving, ready) == ["chat-1"]
    told = replace(leaving, is_told_to_leave=True)
    assert leaves(desired, told, ready) == []
    assert reconcile([desired], [told, ready], NOW_S) == [], "it is nobody's surplus"


def test_several_leave_one_by_one_as_others_get_ready() -> None:
    desired, old = wanted(2), [replica(1), replica(2, num_open=5)]
    starts = reconcile([desired], old, NOW_S)
    assert [start.replica_id for start in starts] == ["chat-3", "chat-4"]
    assert leaves(desired, *old, replica(3, "b")) == ["chat-1"], "that with the fewest open requests"
    assert leaves(desired, *old, replica(3, "b"), replica(4, "b")) == ["chat-1", "chat-2"]


def test_it_leaves_in_time_for_its_streams_when_no_other_gets_ready() -> None:
    assert leaves(wanted(1), replica(1), now_s=NOW_S + 22.0) == []
    assert leaves(wanted(1), replica(1), now_s=NOW_S + 23.0) == ["chat-1"], "60 s less 30 s and a margin"
    assert leaves(wanted(1), replica(1), left_s=30.0, now_s=NOW_S + 9.0) == []
    assert leaves(wanted(1), replica(1), left_s=30.0, now_s=NOW_S + 10.0) == ["chat-1"]
    assert leaves(wanted(1), replica(1), left_s=-1.0) == ["chat-1"], (
        "the deadline was over before it was heard"
    )


def test_what_nobody_would_miss_leaves_at_once() -> None:
    assert leaves(wanted(0), replica(1)) == ["chat-1"]
    assert leaves(wanted(1, surge=0), replica(1)) == ["chat-1"], "it needs the room itself"
    silent = replica(1, lease_ends_s=NOW_S - 1)
    actions = evacuate([wanted(1)], [silent], drains(), NOW_S)
    assert [action.replica_id for action in actions] == ["chat-1"]


def test_without_surge_another_one_starts_when_it_has_left() -> None:
    desired = wanted(1, surge=0, max_count=1)
    assert reconcile([desired], [replica(1)], NOW_S) == []
    assert len(reconcile([desired], [], NOW_S)) == 1


def test_one_that_starts_or_sleeps_there_is_stopped_and_started_elsewhere() -> None:
    desired = wanted(1, standby=1)
    starting = replica(1, report_state="starting", ready_since_s=None)
    asleep = replica(2, report_state="standby", role="standby")
    stops = evacuate([desired], [starting, asleep], drains(), NOW_S)
    assert [type(stop) for stop in stops] == [StopReplica, StopReplica]
    assert [stop.grace_s for stop in stops if isinstance(stop, StopReplica)] == [1.0, 1.0]
    starts = reconcile([desired], [starting, asleep], NOW_S)
    assert [s.is_standby for s in starts if isinstance(s, StartReplica)] == [False, True]


def test_a_standby_elsewhere_takes_over() -> None:
    desired, asleep = wanted(1, standby=1), replica(2, "b", report_state="standby", role="standby")
    actions = reconcile([desired], [replica(1), asleep], NOW_S)
    assert isinstance(actions[0], PromoteReplica)
    assert actions[0].replica_id == "chat-2"


def test_what_is_broken_there_is_replaced_as_anywhere() -> None:
    lost = replica(1, lease_ends_s=NOW_S - 60.0)
    assert evacuate([wanted(1)], [lost], drains(), NOW_S) == []
    (stop,) = reconcile([wanted(1)], [lost], NOW_S)
    assert isinstance(stop, StopReplica)
    assert stop.is_failure
    pending = replica(1, is_alive=False, failures=1, ended_s=NOW_S)
    assert evacuate([wanted(1)], [pending], drains(), NOW_S) == []
