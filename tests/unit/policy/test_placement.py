"""Placement: room, load and turns, and how a decision is told."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.policy.fake_replica import FakeReplica

from headrace.policy.placement import (
    MAX_EXPLANATION_BYTES,
    LeastLoaded,
    Placement,
    RoundRobin,
    explain,
    has_room,
    load_of,
)
from headrace.policy.prompt import PromptHead

FLEETS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99)), max_size=8
).map(lambda rows: [FakeReplica(f"r{index}", *row) for index, row in enumerate(rows)])
PROMPT = PromptHead()


@given(FLEETS)
def test_the_choice_has_room_and_no_other_with_room_has_less_load(fleet: list[FakeReplica]) -> None:
    placement = LeastLoaded().place(fleet, PROMPT, 0.0)
    with_room = [replica for replica in fleet if load_of(replica) < replica.max_open]
    assert placement.scores == {replica.replica_id: load_of(replica) for replica in fleet}
    if not with_room:
        assert placement.replica_id is None
        assert placement.reason == ("no_room" if fleet else "no_replica")
        return
    chosen = next(replica for replica in fleet if replica.replica_id == placement.replica_id)
    assert chosen in with_room
    assert load_of(chosen) == min(load_of(replica) for replica in with_room)
    assert placement.reason == "least_loaded"


def test_idle_replicas_take_turns() -> None:
    fleet = [FakeReplica(f"r{index}") for index in range(3)]
    for _ in range(9):
        chosen = LeastLoaded().place(fleet, PROMPT, 0.0).replica_id
        next(replica for replica in fleet if replica.replica_id == chosen).num_assigned += 1
    assert [replica.num_assigned for replica in fleet] == [3, 3, 3]


def test_what_others_sent_counts_as_load() -> None:
    fleet = [FakeReplica("ours", 2, 2), FakeReplica("shared", 0, 3), FakeReplica("theirs", 1, 0, 64, 0, 4)]
    assert [load_of(replica) for replica in fleet] == [2, 3, 5]
    assert LeastLoaded().place(fleet, PROMPT, 0.0).replica_id == "ours"


@pytest.mark.parametrize(
    ("load", "max_open", "max_running", "num_waiting", "expected"),
    [
        (63, 64, 0, 0, True),
        (64, 64, 0, 0, False),
        (32, 64, 32, 0, True),  # two are sent ahead
        (33, 64, 32, 2, True),
        (34, 64, 32, 0, False),
        (10, 64, 32, 3, False),  # its memory is full: more would wait there
        (4, 64, 4, 0, True),
        (5, 64, 4, 0, False),
        (4, 4, 32, 0, False),
    ],
)
def test_requests_that_would_wait_in_the_engine_wait_in_the_router(
    load: int, max_open: int, max_running: int, num_waiting: int, expected: bool
) -> None:
    replica = FakeReplica("r", load, 0, max_open, max_running=max_running, num_waiting=num_waiting)
    assert has_room(replica, load) is expected


def test_round_robin_takes_turns_and_passes_over_the_full() -> None:
    fleet = [FakeReplica(name) for name in "bca"]
    placer = RoundRobin()
    turns = []
    for turn in range(8):
        fleet[0].num_in_flight = 64 if turn >= 4 else 0
        placement = placer.place(fleet, PROMPT, 0.0)
        placer.bound(placement, PROMPT, 0.0)
        turns.append(placement.replica_id)
    assert turns == ["a", "b", "c", "a", "c", "a", "c", "a"]
    assert placer.place([], PROMPT, 0.0).reason == "no_replica"


def test_an_explanation_is_one_line_with_the_best_alternatives_first() -> None:
    placement = Placement("chat-1", "prefix", {"chat-3": 0.5, "chat-1": 0.0125, "chat-2": 0.045}, 0.834)
    assert explain(placement) == (
        "replica=chat-1; reason=prefix; cached=0.83; score=0.0125; alternatives=chat-2:0.045,chat-3:0.5"
    )
    assert explain(Placement(None, "no_replica", {})) == "replica=none; reason=no_replica; cached=0.00"


@given(st.dictionaries(st.text(string.printable, max_size=160), st.floats(allow_nan=False), max_size=40))
def test_an_explanation_is_short_ascii_whatever_the_scores(scores: dict[str, float]) -> None:
    chosen = next(iter(scores), None)
    line = explain(Placement(chosen, "prefix" if chosen else "no_room", scores, 0.5))
    assert len(line.encode("ascii")) <= MAX_EXPLANATION_BYTES
