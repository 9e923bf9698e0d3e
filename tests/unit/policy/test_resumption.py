"""Where a stream without an engine goes: to what computes the same or nowhere; bounded; poison contained."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.policy.resumption import (
    MAX_CRASHES,
    SUSPECT_CRASHES,
    SUSPECT_PATIENCE_RATIO,
    ContinueAt,
    GiveUp,
    Limits,
    OwnEngine,
    SiblingView,
    Stranded,
    Wait,
    decide,
    guest_room,
)

LIMITS = Limits(3, 60.0)
STREAM = Stranded("A")
READY = OwnEngine("ready", "A")
STARTING = OwnEngine("starting", "A")
GONE = OwnEngine("gone", "A")


def sibling(name: str, num_open: int = 0, stream_class: str = "A", is_ready: bool = True) -> SiblingView:
    return SiblingView(name, stream_class, is_ready, not is_ready, num_open, 10)


def choose(stream: Stranded, own: OwnEngine, *siblings: SiblingView) -> ContinueAt | Wait | GiveUp:
    return decide(stream, own, siblings, LIMITS, 100.0)


def test_the_least_loaded_sibling_that_computes_the_same_takes_it() -> None:
    siblings = (sibling("a", 3), sibling("b", 1), sibling("c", 0, "B"), sibling("d", 0, is_ready=False))
    decision = choose(STREAM, STARTING, *siblings)
    assert isinstance(decision, ContinueAt)
    assert decision.replica_id == "b"
    assert decision.reason == "least loaded of 2: 1 open of 10"


def test_a_durable_fronts_stream_waits_for_whatever_replica_comes() -> None:
    none = OwnEngine("none")
    assert isinstance(choose(STREAM, none), Wait)
    assert isinstance(choose(STREAM, none, sibling("a", stream_class="B")), Wait)
    assert isinstance(choose(replace(STREAM, waited_s=60.0), none), GiveUp)
    suspect = replace(STREAM, num_crashes=SUSPECT_CRASHES)
    assert choose(suspect, none, sibling("a")).reason.startswith("least loaded"), (
        "there is no home to wait for"
    )
    assert isinstance(choose(suspect, none, replace(sibling("a"), num_suspects=1)), Wait)


def test_a_stream_that_has_not_begun_takes_any_class_that_is_known() -> None:
    fresh, none = Stranded(""), OwnEngine("none")
    decision = choose(fresh, none, sibling("a", 0, ""), sibling("b", 2, "B"))
    assert isinstance(decision, ContinueAt)
    assert decision.replica_id == "b"


def test_its_own_engine_comes_first_unless_it_is_to_be_freed() -> None:
    assert choose(STREAM, READY, sibling("a")) == ContinueAt("", "its own engine is ready")
    leaving = replace(READY, is_leaving=True)
    assert isinstance(choose(STREAM, leaving, sibling("a")), ContinueAt)
    assert choose(STREAM, leaving, sibling("a")).reason.startswith("least loaded")
    assert choose(STREAM, leaving) == ContinueAt(
        "", "no sibling can take it, and its own engine is still there"
    )


def test_an_own_engine_that_computes_differently_now_is_none() -> None:
    changed = OwnEngine("ready", "B")
    assert isinstance(choose(STREAM, changed), GiveUp)
    assert isinstance(choose(STREAM, changed, sibling("a")), ContinueAt)


def test_full_siblings_and_starting_engines_are_waited_for() -> None:
    full = sibling("a", guest_room(10))
    assert isinstance(choose(STREAM, STARTING), Wait)
    assert isinstance(choose(STREAM, STARTING, full), Wait)
    assert isinstance(choose(STREAM, GONE, full), Wait)
    assert isinstance(choose(STREAM, GONE, sibling("a", is_ready=False)), Wait)
    assert isinstance(choose(STREAM, GONE, sibling("a", stream_class="", is_ready=False)), Wait)
    assert isinstance(choose(STREAM, GONE, sibling("a", stream_class="B")), GiveUp)
    assert isinstance(choose(STREAM, GONE), GiveUp)


def test_a_sibling_that_would_not_take_it_is_left_alone_until_its_time() -> None:
    stream = replace(STREAM, avoided={"a": 100.2})
    assert isinstance(choose(stream, STARTING, sibling("a")), Wait)
    assert isinstance(decide(stream, STARTING, [sibling("a")], LIMITS, 100.2), ContinueAt)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (replace(STREAM, num_attempts=3), "continued 3 times"),
        (replace(STREAM, waited_s=60.0), "for 60 s"),
        (replace(STREAM, num_crashes=MAX_CRASHES), "no token in between"),
    ],
)
def test_attempts_time_and_crashes_are_bounded(stream: Stranded, reason: str) -> None:
    decision = choose(stream, READY, sibling("a"))
    assert isinstance(decision, GiveUp)
    assert reason in decision.reason


SUSPECT = replace(STREAM, num_crashes=SUSPECT_CRASHES)


def test_what_may_break_engines_is_tried_at_home_and_alone() -> None:
    assert isinstance(choose(SUSPECT, STARTING, sibling("a")), Wait)
    decision = choose(SUSPECT, READY, sibling("a"))
    assert decision == ContinueAt("", "its own engine is ready; 2 engines were lost with it")
    assert isinstance(choose(SUSPECT, replace(READY, num_suspects=1), sibling("a")), Wait)


def test_a_suspect_without_a_home_is_tried_at_a_sibling_that_tries_no_other() -> None:
    busy = replace(sibling("a"), num_suspects=1)
    leaving = replace(READY, is_leaving=True)
    for own in (GONE, leaving, OwnEngine("ready", "B")):
        decision = choose(SUSPECT, own, busy, sibling("b", 5))
        assert isinstance(decision, ContinueAt)
        assert decision.replica_id == "b"
    assert isinstance(choose(SUSPECT, GONE, busy), Wait)
    assert isinstance(choose(SUSPECT, GONE), GiveUp)
    assert choose(SUSPECT, leaving, busy).reason.startswith("no sibling can take it")
    assert isinstance(choose(SUSPECT, replace(leaving, num_suspects=1), busy), Wait)


def test_a_suspect_waits_only_so_long_for_its_own_engine() -> None:
    patience_s = LIMITS.max_wait_s * SUSPECT_PATIENCE_RATIO
    for own in (STARTING, replace(READY, num_suspects=1)):
        patient = replace(SUSPECT, waited_s=patience_s - 0.1)
        assert isinstance(choose(patient, own, sibling("a")), Wait)
        assert isinstance(choose(replace(SUSPECT, waited_s=patience_s), own, sibling("a")), ContinueAt)
        assert isinstance(choose(replace(SUSPECT, waited_s=patience_s), own), Wait)


class Fleet:
    """Streams in their own engine and three siblings. Whatever has the poisonous one in a step breaks."""

    def __init__(self, num_streams: int, poison: int) -> None:
        self.streams = dict.fromkeys(range(num_streams), STREAM)
        self.poison = poison
        self.in_engine: dict[str, set[int]] = {"": set(self.streams), "a": set(), "b": set(), "c": set()}
        self.broken: list[str] = []
        self.given_up: list[int] = []

    def step(self, engine: str) -> None:
        """Let it break, or give a token to each of its streams."""
        members = self.in_engine[engine]
        if self.poison not in members:
            for name in members:
                self.streams[name] = replace(self.streams[name], num_crashes=0, waited_s=0.0, avoided={})
            return
        self.broken.append(engine)
        for name in members:
            stream = self.streams[name]
            avoided = {**stream.avoided, engine: 1e9} if engine else stream.avoided
            self.streams[name] = replace(stream, num_crashes=stream.num_crashes + 1, avoided=avoided)
        members.clear()

    def place(self, state: Literal["ready", "starting", "gone"], waited_s: float) -> None:
        """Decide about each stream that has no engine, which has been so for `waited_s`."""
        placed = set().union(*self.in_engine.values())
        for name in sorted(set(self.streams) - placed - set(self.given_up)):
            stream = replace(self.streams[name], waited_s=waited_s)
            views = [
                replace(sibling(each, len(self.in_engine[each])), num_suspects=self.num_suspects(each))
                for each in ("a", "b", "c")
            ]
            own = OwnEngine(state, "A", num_suspects=self.num_suspects(""))
            decision = decide(stream, own, views, Limits(), 0.0)
            if isinstance(decision, ContinueAt):
                self.in_engine[decision.replica_id].add(name)
                self.streams[name] = replace(stream, num_attempts=stream.num_attempts + 1)
            elif isinstance(decision, GiveUp):
                self.given_up.append(name)

    def num_suspects(self, engine: str) -> int:
        return sum(self.streams[name].is_suspect for name in self.in_engine[engine])


ROUNDS = st.lists(
    st.tuples(
        st.sampled_from(["ready", "starting", "gone"]),
        st.floats(0, 59),
        st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=4),
    ),
    min_size=20,
    max_size=30,
)


@pytest.mark.slow
@settings(max_examples=60)
@given(ROUNDS, st.integers(1, 8), st.data())
def test_a_poisonous_request_breaks_four_engines_and_costs_no_innocent_stream(
    rounds: list[tuple[Literal["ready", "starting", "gone"], float, list[str]]],
    num_streams: int,
    data: st.DataObject,
) -> None:
    """Wherever streams wait, whichever engines are there, in whatever order engines step."""
    fleet = Fleet(num_streams, data.draw(st.integers(0, num_streams - 1)))
    for state, waited_s, steps in rounds:
        for engine in steps:
            fleet.step(engine)
        fleet.place(state, waited_s)
        assert all(fleet.num_suspects(engine) <= 1 for engine in fleet.in_engine)
    for _ in range(10 * num_streams):  # then all goes well
        for engine in fleet.in_engine:
            fleet.step(engine)
        fleet.place("ready", 0.0)
    assert fleet.given_up == [fleet.poison]
    assert len(fleet.broken) == MAX_CRASHES
    at_siblings = [engine for engine in fleet.broken if engine]
    assert len(at_siblings) == len(set(at_siblings)), "no sibling twice"


VIEWS = st.lists(
    st.builds(
        SiblingView,
        st.sampled_from("abcd"),
        st.sampled_from(["A", "B", ""]),
        st.booleans(),
        st.booleans(),
        st.integers(0, 20),
        st.integers(0, 12),
        st.integers(0, 1),
    ),
    max_size=4,
)
OWN = st.builds(
    OwnEngine,
    st.sampled_from(["ready", "starting", "gone"]),
    st.sampled_from(["A", "B"]),
    st.booleans(),
    st.integers(0, 2),
)
STREAMS = st.builds(
    Stranded,
    st.just("A"),
    st.integers(0, 4),
    st.integers(0, 4),
    st.floats(0, 100),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 200)),
)


@given(STREAMS, OWN, VIEWS)
def test_whatever_is_observed_no_stream_goes_where_it_may_not(
    stream: Stranded, own: OwnEngine, views: list[SiblingView]
) -> None:
    decision = decide(stream, own, views, LIMITS, 100.0)
    assert decision.reason
    if stream.num_attempts >= 3 or stream.num_crashes >= MAX_CRASHES or stream.waited_s >= 60:
        assert isinstance(decision, GiveUp)
    if isinstance(decision, ContinueAt) and not decision.replica_id:
        assert (own.state, own.stream_class) == ("ready", "A")
        assert not (stream.is_suspect and own.num_suspects)
    elif isinstance(decision, ContinueAt):
        assert any(
            view.is_ready
            and view.stream_class == "A"
            and view.num_open < guest_room(view.max_open)
            and not (stream.is_suspect and view.num_suspects)
            for view in views
            if view.replica_id == decision.replica_id
        )
        assert stream.avoided.get(decision.replica_id, 0.0) <= 100.0
