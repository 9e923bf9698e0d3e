"""Where replicas are not started because the machine goes away, and that this always ends."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from headrace.control.notices import (
    FORGET_S,
    MAX_MACHINES,
    MAX_NOTICE_S,
    MAX_SETTLE_S,
    SETTLE_S,
    MachineNotices,
)


def noted(node: str = "", leave_by_s: float = 30.0, started_s: float = -math.inf) -> MachineNotices:
    notices = MachineNotices()
    notices.note(node, "chat", leave_by_s, started_s, 100.0)
    return notices


def left_s(
    notices: MachineNotices, now_s: float, nodes: tuple[str, ...] = (), endpoint: str = "chat"
) -> float:
    hold_off = notices.hold_off(endpoint, nodes, now_s)
    return hold_off.left_s if hold_off is not None else 0.0


def test_on_one_machine_nothing_is_started_until_the_deadline_is_over_for_a_while() -> None:
    notices = noted()
    assert left_s(MachineNotices(), 100.0) == 0.0
    assert left_s(notices, 100.0) == left_s(notices, 100.0, endpoint="other") == 30.0 + SETTLE_S
    assert left_s(notices, 130.0) == SETTLE_S
    assert left_s(notices, 130.0 + SETTLE_S) == 0.0
    hold_off = notices.hold_off("chat", (), 101.0)
    assert hold_off is not None
    assert "this machine goes away" in hold_off.reason


def test_the_deadline_that_was_heard_last_counts() -> None:
    notices = noted()
    notices.note("", "chat", 5.0, -math.inf, 102.0)
    assert left_s(notices, 102.0) == 5.0 + SETTLE_S
    for now_s in range(107, 120):  # it leaves, longer than it has
        notices.note("", "chat", 0.0, -math.inf, float(now_s))
    assert left_s(notices, 119.0) == SETTLE_S


def test_a_notice_that_stays_makes_trials_rarer_and_one_much_later_begins_anew() -> None:
    notices, now_s, waits = MachineNotices(), 100.0, list[float]()
    for _ in range(8):
        notices.note("", "chat", 0.0, now_s - 1.0, now_s)
        waits.append(left_s(notices, now_s))
        now_s += waits[-1] + 2.0
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]
    now_s += FORGET_S
    notices.note("", "chat", 0.0, -math.inf, now_s)
    assert left_s(notices, now_s) == SETTLE_S


def test_in_a_cluster_places_avoid_nodes_with_notices_and_nothing_else_is_held_off() -> None:
    notices = noted("a")
    notices.note("b", "other", 50.0, -math.inf, 100.0)
    assert notices.avoided(100.0) == {"a": 30.0 + SETTLE_S, "b": 50.0 + SETTLE_S}
    assert left_s(notices, 100.0, ("a", "b")) == 0.0, "what waits for a node makes the cluster add one"
    assert notices.avoided(141.0) == {"b": 9.0 + SETTLE_S}
    assert notices.avoided(161.0) == {}
    assert noted("").avoided(100.0) == {}


def test_in_a_cluster_an_endpoint_waits_when_the_choice_fell_on_a_node_that_leaves() -> None:
    notices = noted("a")
    notices.note("a", "chat", 28.0, 101.0, 102.0)
    assert left_s(notices, 102.0, ("a", "b")) == SETTLE_S
    assert left_s(notices, 102.0, ("a", "b"), "other") == 0.0
    hold_off = notices.hold_off("chat", ("a", "b"), 102.0)
    assert hold_off is not None
    assert "got a node" in hold_off.reason
    notices.note("a", "chat", 10.0, 113.0, 120.0)
    assert left_s(notices, 120.0, ("a", "b")) == 2 * SETTLE_S


def test_one_that_was_started_before_the_notice_was_known_did_not_return_to_it() -> None:
    notices = noted("a")
    notices.note("a", "chat", 29.0, 99.5, 101.0)
    assert left_s(notices, 101.0, ("a", "b")) == 0.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "a", "b"]),
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(0, 2000),
            st.floats(0, 500),
        )
    )
)
def test_whatever_is_said_the_wait_is_bounded(words: list[tuple[str, float, float, float]]) -> None:
    notices, now_s = MachineNotices(), 0.0
    for node, leave_by_s, pause_s, age_s in words:
        now_s += pause_s
        notices.note(node, "chat", leave_by_s, now_s - age_s, now_s)
        for nodes in ((), ("a",), ("a", "b"), ("a", "c")):
            assert 0.0 <= left_s(notices, now_s, nodes) <= MAX_NOTICE_S + MAX_SETTLE_S
        assert all(0.0 < left <= MAX_NOTICE_S + MAX_SETTLE_S for left in notices.avoided(now_s).values())
    for nodes in ((), ("a", "b")):
        assert left_s(notices, now_s + MAX_NOTICE_S + MAX_SETTLE_S, nodes) == 0.0
    assert notices.avoided(now_s + MAX_NOTICE_S + MAX_SETTLE_S) == {}


def test_machines_are_forgotten_beyond_a_bound_those_whose_time_is_over_first() -> None:
    notices = noted("first")
    for number in range(MAX_MACHINES):
        notices.note(f"n{number}", "chat", 60.0, -math.inf, 101.0)
    assert set(notices.avoided(101.0)) == {f"n{number}" for number in range(MAX_MACHINES)}
