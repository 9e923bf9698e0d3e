"""Placement: the least loaded replica with room, and why."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.placement import load_of, place


@dataclass
class FakeReplica:
    replica_id: str
    num_in_flight: int
    num_open: int
    max_open: int
    num_assigned: int = 0


FLEETS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99)), max_size=8
).map(lambda rows: [FakeReplica(f"r{index}", *row) for index, row in enumerate(rows)])


@given(FLEETS)
def test_the_choice_has_room_and_no_other_with_room_has_less_load(fleet: list[FakeReplica]) -> None:
    placement = place(fleet)
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
    fleet = [FakeReplica(f"r{index}", 0, 0, 4) for index in range(3)]
    for _ in range(9):
        chosen = place(fleet).replica_id
        next(replica for replica in fleet if replica.replica_id == chosen).num_assigned += 1
    assert [replica.num_assigned for replica in fleet] == [3, 3, 3]


def test_what_others_sent_counts_as_load() -> None:
    fleet = [FakeReplica("ours", 2, 2, 4), FakeReplica("shared", 0, 3, 4)]
    assert place(fleet).replica_id == "ours"
