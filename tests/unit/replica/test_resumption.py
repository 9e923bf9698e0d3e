"""Streams that move between engines: every token once, one end, and nothing left behind anywhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.replica.fake_streams import FakeEngine, FakePeers, FakeStream, make_sibling

from headrace.api.messages import KvPlace, SamplingParams, StepOutput
from headrace.clock import VirtualClock
from headrace.errors import Overloaded
from headrace.observability.front_metrics import FrontMetrics
from headrace.policy.resumption import Limits, OwnEngine
from headrace.replica.carried_stream import CarriedStream
from headrace.replica.resumption import StreamKeeper


class World:
    """One front's keeper between its engine and two siblings."""

    def __init__(self, max_attempts: int = 3) -> None:
        self.clock = VirtualClock(100.0)
        self.engine = FakeEngine()
        self.peers = FakePeers()
        self.metrics = FrontMetrics("chat", "chat-1")
        self.is_leaving = False
        self.keeper = StreamKeeper(
            self.engine, self.peers, self.own, Limits(max_attempts, 60.0), self.metrics, self.clock
        )
        self.keeper.set_siblings([make_sibling("a"), make_sibling("b", 1)])
        self.streams: dict[str, FakeStream] = {}

    def own(self) -> OwnEngine:
        state = self.engine.state
        return OwnEngine(state if state in ("ready", "starting") else "gone", "A", self.is_leaving)

    def start(self, request_id: str = "r") -> FakeStream:
        stream = self.streams[request_id] = FakeStream(request_id)
        self.keeper.submit(stream.request, stream)
        return stream

    def lose(self) -> None:
        """The own engine dies; streams that were in no other tell the keeper, as answers' choices do."""
        self.engine.die()
        for request_id, stream in self.streams.items():
            for reason in stream.lost:
                self.keeper.on_engine_lost(stream, reason)
            stream.lost.clear()
            assert stream.request.request_id == request_id

    def tick(self, seconds: float = 0.02) -> None:
        self.clock.advance(seconds)
        self.keeper._run_tick()

    def close(self) -> None:
        self.keeper.check_integrity()
        self.keeper.close()


def output(request_id: str, *token_ids: int, **fields: Any) -> StepOutput:
    return StepOutput(request_id, list(token_ids), **fields)


async def test_a_lost_stream_goes_on_at_a_sibling_from_its_tokens() -> None:
    world = World()
    stream = world.start()
    world.engine.give("r", output("r", 5, engine_ns=10))
    world.engine.give("r", output("r", 6, engine_ns=30))
    world.lose()
    [request] = world.peers.at("/a")
    assert request.resume_from == [5, 6]
    assert (request.prompt_token_ids, request.sampling) == ([1, 2], SamplingParams(max_tokens=100, seed=7))
    assert (request.stream_class, stream.hosts) == ("A", ["a"])
    world.clock.advance(0.25)
    world.peers.give("/a", output(request.request_id, 7, engine_ns=5), world.clock.now_s())
    world.peers.give("/a", output(request.request_id, 8, finish_reason="length", engine_ns=9), 101.0)
    assert (stream.token_ids, stream.finish_reason) == ([5, 6, 7, 8], "length")
    assert stream.engine_ns == 39, "the sum over both engines"
    assert world.metrics.num_resumed == {"engine_lost": 1, "handover": 0}
    assert (world.metrics.num_resumed_tokens, world.metrics.resume_gap.total) == (2, 0.25)
    assert not world.keeper.has_request("r")
    world.close()


async def test_each_engine_is_told_where_the_one_before_left_what_it_computed() -> None:
    """Not that of a stream which may be what breaks them."""
    world = World(max_attempts=6)
    world.keeper.set_siblings([make_sibling("a", kv_place=KvPlace(2, 20)), make_sibling("b", 1)])
    stream = world.start()
    assert world.engine.requests["r"].kv_place is None
    world.lose()
    [request] = world.peers.at("/a")
    assert request.kv_place == world.engine.kv_place
    world.peers.give("/a", output(request.request_id, 5))
    world.peers.die("/a")
    [request] = world.peers.at("/b")
    assert request.kv_place == KvPlace(2, 20)
    world.peers.give("/b", output(request.request_id, 6))
    world.engine.state = "ready"
    world.peers.die("/b")
    [request] = [each for each in world.engine.requests.values() if each.resume_from == [5, 6]]
    assert request.kv_place is None, "b has none"
    world.engine.die()
    world.engine.state = "ready"
    for _ in range(200):
        world.tick(0.1)
    suspects = [each for each in world.peers.at("/a") if each.is_suspect]
    suspects += [each for each in world.engine.requests.values() if each.is_suspect]
    assert suspects
    assert all(each.kv_place is None for each in suspects)
    assert stream.error is None
    world.keeper.abort("r")
    world.close()


async def test_with_no_sibling_the_restarted_engine_goes_on() -> None:
    world = World()
    world.keeper.set_siblings([])
    stream = world.start()
    world.engine.give("r", output("r", 5))
    world.lose()
    assert world.keeper.num_waiting == 1
    world.tick()
    world.engine.state = "ready"
    world.tick()
    assert world.engine.requests["r@1"].resume_from == [5]
    world.engine.give("r@1", output("r@1", 6, finish_reason="stop"))
    assert (stream.token_ids, stream.hosts) == ([5, 6], [""])
    world.close()


async def test_a_sibling_that_dies_in_turn_is_followed_by_the_next_and_attempts_are_bounded() -> None:
    world = World()
    stream = world.start()
    for number, path in enumerate(("/a", "/b")):
        world.lose() if number == 0 else world.peers.die("/a")
        [request] = world.peers.at(path)
        world.peers.give(path, output(request.request_id, number))
    world.engine.state = "ready"
    world.peers.die("/b")
    world.engine.give("r@3", output("r@3", 2))
    assert stream.token_ids == [0, 1, 2]
    assert world.keeper.has_request("r")
    world.engine.die()
    assert stream.error is not None
    assert "continued 3 times" in stream.error.message
    assert (stream.hosts, world.metrics.num_given_up) == (["a", "b", ""], 1)
    world.close()


async def test_a_front_without_an_engine_of_its_own_comes_back_to_hosts_that_died_with_a_stream() -> None:
    """It leaves, and both siblings' engines are killed: what they start again is the only place there is."""
    world = World(max_attempts=6)
    stream = world.start()
    world.lose()
    world.engine.state = "failed"
    for path in ("/a", "/b"):
        assert world.peers.at(path)
        world.peers.die(path)
    assert world.keeper.num_waiting == 1
    world.tick(0.9)
    assert world.keeper.num_waiting == 1, "they need a moment to start again"
    world.tick(0.2)
    [request] = world.peers.at("/a")
    world.peers.give("/a", output(request.request_id, 5, finish_reason="length"))
    assert (stream.token_ids, stream.error) == ([5], None)
    world.close()


async def test_without_attempts_a_lost_engine_ends_the_stream_at_once() -> None:
    world = World(max_attempts=0)
    stream = world.start()
    world.lose()
    assert stream.error is not None
    assert stream.error.code == "replica_lost"
    assert world.peers.hosted == {}
    other = World(max_attempts=0)
    other.start()
    assert other.keeper.hand_over() == 1
    assert not other.keeper.has_room_elsewhere()
    assert world.keeper.has_room_elsewhere() is False
    assert World().keeper.has_room_elsewhere()
    world.close()


async def test_a_host_that_gives_it_back_costs_no_attempt_and_is_asked_again_later() -> None:
    world = World()
    world.keeper.set_siblings([make_sibling("a")])
    stream = world.start()
    world.lose()
    for _ in range(10):
        world.peers.give_back("/a")
        assert world.peers.at("/a") == []
        world.tick(0.1)
        assert world.peers.at("/a") == []
        world.tick(0.2)
        assert len(world.peers.at("/a")) == 1
    assert stream.error is None
    world.close()


async def test_time_without_an_engine_is_bounded() -> None:
    world = World()
    world.keeper.set_siblings([])
    stream = world.start()
    world.lose()
    world.tick(59.9)
    assert stream.error is None
    world.tick(0.2)
    assert stream.error is not None
    assert "for 60 s" in stream.error.message
    world.close()


async def test_a_client_that_leaves_takes_its_stream_back_wherever_it_is() -> None:
    world = World()
    for name in ("hosted", "waiting", "own"):
        world.start(name)
    world.keeper.set_siblings([make_sibling("a", 11)])
    world.lose()
    assert [request.request_id for request in world.peers.at("/a")] == ["hosted@1"], "room for one"
    assert world.keeper.num_waiting == 2
    world.keeper.abort("hosted")
    assert world.peers.aborted == [("/a", "hosted@1")]
    world.keeper.abort("waiting")
    world.engine.state = "ready"
    world.tick()
    world.keeper.abort("own")
    assert world.engine.aborted == ["own@2"]
    for name in ("hosted", "waiting", "own"):
        world.keeper.abort(name)
    assert (len(world.peers.aborted), len(world.engine.aborted), world.keeper.num_waiting) == (1, 1, 0)
    world.close()


async def test_handing_over_moves_what_siblings_take_and_late_tokens_belong_to_nobody() -> None:
    world = World()
    first, second = world.start("one"), world.start("two")
    world.engine.give("one", output("one", 5))
    world.is_leaving = True
    world.keeper.set_siblings([make_sibling("a", 11)])
    assert world.keeper.hand_over() == 1
    assert world.engine.aborted == ["one"]
    world.engine.give("one", output("one", 6))
    assert first.token_ids == [5]
    [request] = world.peers.at("/a")
    world.peers.give("/a", output(request.request_id, 6))
    assert first.token_ids == [5, 6]
    assert world.engine.has_request("two"), "nobody has room: it stays"
    world.keeper.set_siblings([make_sibling("a", 12), make_sibling("b")])
    assert world.keeper.hand_over() == 0
    assert second.hosts == ["b"]
    assert world.metrics.num_resumed == {"engine_lost": 0, "handover": 2}
    world.close()


async def test_a_guest_of_others_is_not_handed_over() -> None:
    world = World()

    class Guest:
        def on_output(self, output: StepOutput, now_s: float) -> bool: ...  # type: ignore[empty-body]
        def flush(self) -> None: ...
        def on_engine_lost(self, reason: str) -> None: ...
        def on_broken(self) -> None: ...

    stream = world.start()
    world.engine.submit(stream.request.__class__("guest1:x", [1], SamplingParams()), Guest())
    assert world.keeper.hand_over() == 0
    assert list(world.engine.streams) == ["guest1:x"]
    world.close()


async def test_streams_leave_a_host_that_leaves_and_come_home_if_that_is_there() -> None:
    world = World()
    stream = world.start()
    world.lose()
    world.keeper.set_siblings([make_sibling("a", state="draining"), make_sibling("b")])
    assert world.peers.aborted == [("/a", "r@1")]
    assert [request.request_id for request in world.peers.at("/b")] == ["r@2"]
    world.keeper.set_siblings([make_sibling("b", leave_by_s=20.0)])
    assert len(world.peers.at("/b")) == 1, "there is no better place"
    world.engine.state = "ready"
    world.keeper.set_siblings([make_sibling("b", leave_by_s=19.0)])
    assert world.engine.has_request("r@3")
    assert stream.hosts == ["a", "b", ""]
    world.close()


async def test_a_lost_engines_streams_are_spread() -> None:
    world = World()
    world.keeper.set_siblings([make_sibling("a"), make_sibling("b")])
    for number in range(10):
        world.start(str(number))
    world.lose()
    assert (len(world.peers.at("/a")), len(world.peers.at("/b"))) == (5, 5)
    world.close()


async def test_suspects_come_home_one_after_another() -> None:
    world = World()
    world.keeper.set_siblings([make_sibling("a")])
    streams = [world.start(str(number)) for number in range(3)]
    world.lose()
    world.peers.die("/a")
    world.engine.state = "ready"
    world.tick()
    assert world.engine.num_requests == 1
    [name] = world.engine.streams
    world.tick()
    assert world.engine.num_requests == 1, "it has not shown yet that it is harmless"
    world.engine.give(name, output(name, 1))
    world.tick()
    assert world.engine.num_requests == 2
    world.engine.die()
    world.engine.state = "ready"
    world.tick()
    assert world.engine.num_requests == 1, "the one on trial; the one that gave a token is at the sibling"
    world.engine.die()
    assert [stream.error is not None for stream in streams] == [False, True, False], "the one on trial twice"
    assert "4 engines were lost with it" in str(streams[1].error)
    world.close()


async def test_suspects_without_a_home_are_tried_at_siblings_one_at_each() -> None:
    world = World()
    world.keeper.set_siblings([make_sibling("a")])
    streams = [world.start(str(number)) for number in range(3)]
    world.lose()
    world.engine.state = "asleep"
    world.peers.die("/a")
    assert world.keeper.num_waiting == 3, "not where they were lost"
    world.keeper.set_siblings([make_sibling("b"), make_sibling("c")])
    assert [len(world.peers.at(path)) for path in ("/a", "/b", "/c")] == [0, 1, 1]
    [at_b] = world.peers.at("/b")
    assert at_b.is_suspect
    world.peers.give("/b", output(at_b.request_id, 1))
    world.tick()
    assert [len(world.peers.at(path)) for path in ("/b", "/c")] == [2, 1]
    for path in ("/b", "/c"):
        for request in world.peers.at(path):
            world.peers.give(path, output(request.request_id, 2, finish_reason="stop"))
    assert [stream.finish_reason for stream in streams] == ["stop"] * 3
    world.close()


async def test_a_stream_that_gave_a_token_again_is_no_suspect_and_can_be_handed_over() -> None:
    world = World()
    world.keeper.set_siblings([make_sibling("a")])
    stream = world.start()
    world.lose()
    world.peers.die("/a")
    world.engine.state = "ready"
    world.tick()
    [name] = world.engine.streams
    world.engine.give(name, output(name, 1))
    world.keeper.set_siblings([make_sibling("b")])
    assert world.keeper.hand_over() == 0
    [request] = world.peers.at("/b")
    assert not request.is_suspect
    assert stream.hosts == ["a", "", "b"]
    world.close()


EVENTS = st.one_of(
    st.tuples(st.sampled_from(["give", "end", "leave"]), st.integers(0, 2)),
    st.tuples(
        st.sampled_from(["lose", "ready", "asleep", "die a", "die b", "back a", "hand over", "drop a", "all"])
    ),
    st.tuples(st.just("tick"), st.sampled_from([0.02, 0.3, 20.0])),
)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(EVENTS, max_size=25))
def test_every_token_comes_once_in_order_and_every_stream_ends_once_whatever_happens(
    events: list[tuple[Any, ...]],
) -> None:
    async def run() -> None:
        world = World()
        streams = [world.start(str(number)) for number in range(3)]
        left: set[int] = set()
        for event in events:
            play(world, event, left)
            world.keeper.check_integrity()
            for number, stream in enumerate(streams):
                assert stream.token_ids == list(range(len(stream.token_ids)))
                places = places_of(world, str(number))
                is_over = bool(stream.error or stream.finish_reason) or number in left
                waits = (
                    str(number) in world.keeper._carried and world.keeper._carried[str(number)].host is None
                )
                assert len(places) == (0 if is_over or waits else 1), (number, places)
            tried = Counter(each.host for each in world.keeper._carried.values() if each.is_on_trial())
            assert all(number == 1 for number in tried.values()), tried
        world.close()

    asyncio.run(run())


def places_of(world: World, name: str) -> list[str]:
    own = [each for each in world.engine.streams if each.partition("@")[0] == name]
    return own + [each for _, each in world.peers.hosted if each.partition("@")[0] == name]


def play(world: World, event: tuple[Any, ...], left: set[int]) -> None:
    kind = event[0]
    if kind in ("give", "end"):
        reason = "stop" if kind == "end" else None
        name = str(event[1])
        index = len(world.streams[name].token_ids)
        for each in places_of(world, name):
            step = StepOutput(each, [index], reason)  # type: ignore[arg-type]
            world.engine.give(each, step, world.clock.now_s())
            for path in ("/a", "/b"):
                world.peers.give(path, step, world.clock.now_s())
    elif kind == "leave":
        if not world.streams[str(event[1])].error and not world.streams[str(event[1])].finish_reason:
            left.add(event[1])
        world.keeper.abort(str(event[1]))
    elif kind == "lose":
        world.lose()
    elif kind in ("ready", "asleep"):
        if kind == "ready" or not world.engine.num_requests:
            world.engine.state = kind
    elif kind == "tick":
        world.tick(event[1])
    elif kind == "hand over":
        world.keeper.hand_over()
    elif kind == "drop a":
        world.keeper.set_siblings([make_sibling("a", state="standby"), make_sibling("b")])
    elif kind == "all":
        world.keeper.set_siblings([make_sibling("a"), make_sibling("b")])
    elif kind == "back a":
        world.peers.give_back("/a")
    else:
        world.peers.die(f"/{kind[-1]}")


def test_a_carried_stream_says_where_it_is() -> None:
    world = World()
    carried = CarriedStream(world.keeper, FakeStream(), "A")
    assert repr(carried) == "CarriedStream(r at its own engine, 0 tokens)"


# ---- requests that come while there is no engine


async def test_a_request_that_comes_while_its_engine_starts_again_begins_at_a_sibling() -> None:
    world = World()
    world.engine.state = "starting"
    assert world.keeper.may_hold(False)
    stream = world.start()
    [request] = world.peers.at("/a")
    assert (request.resume_from, request.stream_class) == ([], "A")
    world.peers.give("/a", output(request.request_id, 5, finish_reason="stop"), 100.0)
    assert (stream.token_ids, stream.finish_reason, stream.hosts) == ([5], "stop", [])
    assert world.metrics.num_resumed == {"engine_lost": 0, "handover": 0}, "it began there"
    world.close()


async def test_without_siblings_it_waits_for_its_engine_and_for_no_longer_than_a_stream_does() -> None:
    world = World()
    world.keeper.set_siblings([])
    world.engine.state = "starting"
    served, late, left = world.start("r"), world.start("late"), world.start("left")
    assert world.keeper.num_waiting == 3
    world.keeper.abort("left")
    world.engine.state = "ready"
    world.tick()
    assert set(world.engine.streams) == {"r@1", "late@2"}
    world.engine.give("r@1", output("r@1", 5, finish_reason="stop"))
    assert (served.token_ids, left.error) == ([5], None)
    world.lose()
    world.tick(61.0)
    assert late.error is not None
    assert "no engine could continue it for 60 s" in late.error.message
    world.close()


async def test_its_engines_lost_before_a_token_make_it_a_suspect_as_any_other() -> None:
    world = World()
    world.keeper.set_siblings([])
    world.engine.state = "starting"
    stream = world.start()
    for _ in range(3):
        assert stream.error is None
        world.engine.state = "ready"
        world.tick()
        world.engine.die()
        world.tick()
    world.engine.state = "ready"
    world.tick()
    world.engine.die()
    world.tick()
    assert stream.error is not None
    world.close()


@pytest.mark.parametrize("state", ["starting", "asleep", "failed"])
async def test_where_streams_may_not_be_continued_or_the_engine_comes_not_back_it_is_refused(
    state: Any,
) -> None:
    world = World(max_attempts=0 if state == "starting" else 3)
    world.engine.state = state
    assert not world.keeper.may_hold(False)
    with pytest.raises(Overloaded):
        world.start()
    assert not world.keeper.has_request("r")
    world.close()


async def test_a_front_that_leaves_holds_only_what_has_no_better_place() -> None:
    world = World()
    world.is_leaving = True
    assert not world.keeper.may_hold(True), "its gateway finds the ready siblings"
    world.keeper.set_siblings([make_sibling("a", state="starting")])
    assert world.keeper.may_hold(True)
    world.engine.state = "stopped"
    stream = world.start()
    assert world.keeper.num_waiting == 1
    world.keeper.set_siblings([make_sibling("a")])
    [request] = world.peers.at("/a")
    world.peers.give("/a", output(request.request_id, 5, finish_reason="stop"), 100.0)
    assert stream.token_ids == [5]
    world.keeper.set_siblings([])
    assert not world.keeper.may_hold(True), "its engine is stopped, and nobody is coming"
    world.close()
