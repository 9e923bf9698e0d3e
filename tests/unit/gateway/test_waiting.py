"""Held streams that wait in the relay: one decision each, told once, wherever HAProxy waits for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.arrivals import Bound, Refused
from headrace.gateway.waiting import Decision, Waiting, WaitingRoom


def make_waiting(told: list[Decision], parked: list[str], *, can_park: bool = True) -> Waiting:
    return Waiting(told.append, (lambda: parked.append("parked")) if can_park else None)


def test_a_request_that_is_never_parked_is_told_its_decision() -> None:
    told: list[Decision] = []
    waiting = make_waiting(told, [])
    waiting.decide(Bound("s1"))
    assert told == [Bound("s1")]
    assert not waiting.is_parked


def test_a_decision_after_the_second_pass_goes_there_and_nowhere_else() -> None:
    first: list[Decision] = []
    second: list[Decision] = []
    waiting = make_waiting(first, [])
    waiting.park()
    assert not waiting.rejoin(second.append)
    assert waiting.is_rejoined
    waiting.decide(Bound("s1"))
    assert (first, second) == ([], [Bound("s1")])


def test_a_decision_between_the_passes_is_kept_for_the_second() -> None:
    second: list[Decision] = []
    waiting = make_waiting([], [])
    waiting.park()
    waiting.decide(Refused("late", "overloaded", 3))
    assert not waiting.is_rejoined
    assert waiting.rejoin(second.append)
    assert second == [Refused("late", "overloaded", 3)]


def test_requests_are_parked_when_they_are_due_while_they_are_held_and_there_is_room() -> None:
    room = WaitingRoom(max_parked=2)
    held = {"a", "b", "c", "d"}
    waitings = {name: make_waiting([], []) for name in "abcd"}
    for due_s, name in ((3.0, "b"), (1.0, "a"), (2.0, "c"), (9.0, "d")):
        room.held(name, waitings[name], due_s)
    assert room.due(0.5, held.__contains__) == []
    held.discard("a")  # bound meanwhile
    assert room.due(3.5, held.__contains__) == [waitings["c"], waitings["b"]]
    assert room.due(10.0, held.__contains__) == [], "the room is full"
    assert room.leave("c") is waitings["c"]
    assert room.due(10.0, held.__contains__) == [waitings["d"]]
    assert (room.get("d"), room.get("c"), len(room)) == (waitings["d"], None, 2)


def test_a_request_that_comes_again_by_itself_is_not_parked_for_the_call_that_was_given_up() -> None:
    room, told, parked = WaitingRoom(max_parked=2), list[Decision](), list[str]()
    first, again = make_waiting(told, parked), make_waiting([], [], can_park=False)
    room.held("a", first, 1.0)
    room.held("a", again, 1.0)
    assert room.due(2.0, {"a"}.__contains__) == []
    first.decide(Bound("s1"))
    assert (told, parked, room.get("a")) == ([], [], None)


def test_what_cannot_be_parked_is_no_candidate() -> None:
    room = WaitingRoom(max_parked=2)
    room.held("a", make_waiting([], [], can_park=False), 0.0)
    assert room.due(1.0, lambda _: True) == []


@given(st.lists(st.sampled_from(["park", "rejoin", "decide"]), max_size=6))
def test_whatever_the_order_a_decision_is_told_exactly_once(events: list[str]) -> None:
    told: list[Decision] = []
    waiting = make_waiting(told, [])
    is_decided = False
    for event in events:
        if event == "park" and waiting.can_park and not is_decided:
            waiting.park()
        elif event == "rejoin" and waiting.is_parked and not waiting.is_rejoined:
            waiting.rejoin(told.append)
        elif event == "decide" and not is_decided:
            waiting.decide(Bound("s1"))
            is_decided = True
    is_heard = is_decided and (not waiting.is_parked or waiting.is_rejoined)
    assert len(told) == is_heard


def test_a_parked_request_whose_stream_ended_without_a_word_takes_nobodys_place_for_long() -> None:
    """HAProxy died with it, or ended it before the relay had it: no line will come."""
    room = WaitingRoom(max_parked=1)
    room.held("a", make_waiting([], []), 0.0)
    assert len(room.due(1.0, lambda _: True)) == 1
    is_open = {"a": True}
    for now_s in range(2, 200):
        assert room.sweep(float(now_s), is_open.__getitem__) == 0
    is_open["a"] = False
    for now_s in range(200, 261):
        assert room.sweep(float(now_s), is_open.__getitem__) == 0
        assert room.get("a") is not None, "its decision may still be asked for"
    assert room.sweep(261.5, is_open.__getitem__) == 1
    room.held("b", make_waiting([], []), 0.0)
    assert len(room.due(262.0, lambda _: True)) == 1
