"""Where a stream without an engine goes: to what computes the same or nowhere; bounded; poison contained."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.resumption import (
    MAX_CRASHES,
    SUSPECT_CRASHES,
    ContinueAt,
    GiveUp,
    Limits,
    OwnEngine,
    SiblingView,
    Stranded,
    Wait,
    decide,
    find_sibling,
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


def test_its_own_engine_comes_first_unless_it_is_to_be_freed() -> None:
    assert choose(STREAM, READY, sibling("a")) == ContinueAt("", "its own engine is ready")
    leaving = replace(READY, is_leaving=True)
    assert isinstance(choose(STREAM, leaving, sibling("a")), ContinueAt)
    assert choose(STREAM, leaving, sibling("a")).reason.startswith("least loaded")
    assert choose(STREAM, leaving) == ContinueAt("", "no sibling has room, and its own engine is still there")


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


def test_what_may_break_engines_is_tried_on_its_own_alone() -> None:
    suspect = replace(STREAM, num_crashes=SUSPECT_CRASHES)
    assert isinstance(choose(suspect, STARTING, sibling("a")), Wait)
    decision = choose(suspect, READY, sibling("a"))
    assert isinstance(decision, ContinueAt)
    assert decision.replica_id == ""
    assert isinstance(choose(suspect, replace(READY, num_suspects=1), sibling("a")), Wait)
    assert isinstance(choose(suspect, GONE, sibling("a")), GiveUp)
    assert find_sibling(suspect, [sibling("a")], 0.0) is None


def test_a_poisonous_request_costs_at_most_one_sibling_and_no_innocent_stream() -> None:
    """Ten streams in one engine; one of them breaks every engine in whose step it is."""
    streams = dict.fromkeys(range(10), STREAM)
    in_engine: dict[str, set[int]] = {"own": set(streams), "a": set(), "b": set()}
    broken, given_up = [], []
    limits = Limits(10, 60.0)
    for _ in range(30):
        # Every engine takes a step: the one with stream 3 in it breaks, the others give a token each.
        for engine, members in in_engine.items():
            if 3 in members:
                broken.append(engine)
                for name in members:
                    stream = streams[name]
                    streams[name] = replace(
                        stream,
                        num_crashes=stream.num_crashes + 1,
                        num_attempts=stream.num_attempts + 1,
                        avoided={**stream.avoided, engine: 1e9} if engine != "own" else stream.avoided,
                    )
                members.clear()
            else:
                for name in members:
                    streams[name] = replace(streams[name], num_crashes=0)
        placed = set().union(*in_engine.values())
        for name in sorted(set(streams) - placed - set(given_up)):
            suspects = [other for other in in_engine["own"] if streams[other].is_suspect]
            own = OwnEngine("ready", "A", is_leaving=not broken, num_suspects=len(suspects))
            state: Literal["ready", "starting"] = "ready" if len(broken) != 1 else "starting"
            views = [sibling(each, len(in_engine[each])) for each in ("a", "b")]
            decision = decide(streams[name], replace(own, state=state), views, limits, 0.0)
            if isinstance(decision, ContinueAt):
                in_engine[decision.replica_id or "own"].add(name)
            elif isinstance(decision, GiveUp):
                given_up.append(name)
    assert given_up == [3]
    assert broken == ["own", broken[1], "own"]


VIEWS = st.lists(
    st.builds(
        SiblingView,
        st.sampled_from("abcd"),
        st.sampled_from(["A", "B", ""]),
        st.booleans(),
        st.booleans(),
        st.integers(0, 20),
        st.integers(0, 12),
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
    elif isinstance(decision, ContinueAt):
        assert not stream.is_suspect
        assert any(
            view.is_ready and view.stream_class == "A" and view.num_open < guest_room(view.max_open)
            for view in views
            if view.replica_id == decision.replica_id
        )
        assert stream.avoided.get(decision.replica_id, 0.0) <= 100.0
