"""When a drained node goes, on the controller's clock, and how long its replicas may wait for others."""

from __future__ import annotations

import math

import pytest

from headrace.api.messages import NodeState
from headrace.control.node_drains import LEAVING_MARGIN_S, NO_DEADLINE_S, NodeDrains
from headrace.control.notices import MAX_NOTICE_S

WALL_S = 1_000_000.0


def drained(deadline_s: float = WALL_S + 60.0, node_id: str = "a") -> NodeState:
    return NodeState(node_id, "10.0.0.1", is_draining=True, drain_deadline_s=deadline_s)


def noted(deadline_s: float = WALL_S + 60.0) -> NodeDrains:
    drains = NodeDrains()
    drains.note([drained(deadline_s), NodeState("b", "10.0.0.2")], 100.0, WALL_S)
    return drains


def test_the_deadline_is_taken_over_to_the_own_clock_once() -> None:
    drains = noted()
    assert ("a" in drains, "b" in drains) == (True, False)
    assert (drains.leave_by_s("a"), drains.leave_by_s("b")) == (160.0, math.inf)
    drains.note([drained()], 110.0, WALL_S + 500.0)  # the wall clock was set meanwhile
    assert drains.leave_by_s("a") == 160.0
    drains.note([drained(WALL_S + 530.0)], 110.0, WALL_S + 500.0)
    assert drains.leave_by_s("a") == 140.0, "another deadline is a new word"


@pytest.mark.parametrize(
    ("deadline_s", "left_s"),
    [
        (0.0, NO_DEADLINE_S),
        (-5.0, NO_DEADLINE_S),
        (math.nan, NO_DEADLINE_S),
        (math.inf, NO_DEADLINE_S),
        (WALL_S - 5.0, 0.0),
        (WALL_S + 1e9, MAX_NOTICE_S),
    ],
)
def test_whatever_is_told_the_time_is_bounded(deadline_s: float, left_s: float) -> None:
    assert noted(deadline_s).leave_by_s("a") == 100.0 + left_s


def test_a_node_that_is_gone_or_drained_no_more_is_forgotten() -> None:
    for after in ([], [NodeState("a", "10.0.0.1")], [NodeState("a", "1", False, is_draining=True)]):
        drains = noted()
        drains.note(after, 101.0, WALL_S + 1.0)
        assert "a" not in drains
        assert drains.leave_by_s("a") == drains.patience_ends_s("a", 30.0) == math.inf


def test_streams_get_their_grace_or_two_thirds_of_a_short_time() -> None:
    drains = noted(WALL_S + 600.0)
    assert drains.patience_ends_s("a", 30.0) == 700.0 - 30.0 - LEAVING_MARGIN_S
    assert drains.patience_ends_s("a", 1000.0) == 300.0
    assert noted(WALL_S + 30.0).patience_ends_s("a", 30.0) == 110.0
    assert noted(WALL_S - 5.0).patience_ends_s("a", 0.0) == 100.0


def test_people_are_told_until_when() -> None:
    assert noted().describe("a", 137.0) == "draining for 23 s more, by Ray"
    assert noted().describe("a", 165.0) == "draining, by Ray, for 5 s past its deadline"
    assert noted(0.0).describe("a", 100.0) == "draining, by Ray, without a deadline"
    assert noted().describe("b", 100.0) == ""
