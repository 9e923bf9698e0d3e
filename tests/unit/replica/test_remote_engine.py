"""A durable front's streams: placed where a router said, elsewhere when that fails, and not lost for good."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from tests.unit.replica.fake_streams import FakePeers, FakeStream, make_sibling

from headrace.api.messages import EngineSpec, GenerationRequest, Placed, SamplingParams, StepOutput
from headrace.clock import VirtualClock
from headrace.observability.front_metrics import FrontMetrics
from headrace.policy.resumption import MAX_CRASHES, Limits
from headrace.replica import remote_engine
from headrace.replica.http_messages import HttpRequest
from headrace.replica.ledger import RequestRecord
from headrace.replica.remote_engine import NoEngine, RemoteEngine, no_own_engine
from headrace.replica.request_head import place_of
from headrace.replica.resumption import StreamKeeper
from headrace.replica.stream_class import text_class_of

SPEC = EngineSpec("native", "some-model")
TEXT = text_class_of(SPEC)


class World:
    """A durable front's engine between two replicas."""

    def __init__(self) -> None:
        self.clock = VirtualClock(100.0)
        self.peers = FakePeers()
        self.metrics = FrontMetrics("chat", "chat:g1-1")
        limits = Limits(6, 60.0)
        self.keeper = StreamKeeper(NoEngine(), self.peers, no_own_engine, limits, self.metrics, self.clock)
        self.engine = RemoteEngine(SPEC, self.keeper)
        self.know("a", "b")

    def know(self, *names: str, **fields: Any) -> None:
        values = {"text_class": TEXT, "vocab_size": 100, "max_context_tokens": 50, **fields}
        self.engine.set_siblings([make_sibling(name, **values) for name in names])

    def start(self, place: str = "b", name: str = "r") -> FakeStream:
        stream = FakeStream(name)
        stream.request = msgspec.structs.replace(stream.request, placed=Placed("hr-g1-r", place, [1, 2], 9))
        self.engine.submit(stream.request, stream)
        return stream

    def give(self, path: str, *token_ids: int, **fields: Any) -> None:
        [request] = self.peers.at(path)
        self.peers.give(path, StepOutput(request.request_id, list(token_ids), **fields), self.clock.now_s())

    def tick(self, seconds: float = 0.02) -> None:
        self.clock.advance(seconds)
        self.keeper._run_tick()

    def close(self) -> None:
        self.keeper.check_integrity()
        self.keeper.close()


async def test_a_request_begins_where_its_router_placed_it_and_that_is_no_resumption() -> None:
    world = World()
    stream = world.start("b")
    [request] = world.peers.at("/b")
    assert request.placed == Placed("hr-g1-r", "b", [1, 2], 9)
    assert (request.stream_class, request.resume_from) == ("A", [])
    world.give("/b", 5, finish_reason="stop", engine_ns=7)
    assert (stream.token_ids, stream.finish_reason, stream.engine_ns) == ([5], "stop", 7)
    assert (stream.hosts, world.metrics.num_resumed) == ([], {"engine_lost": 0, "handover": 0})
    assert (world.metrics.resume_gap.total, world.keeper.moves.recent(100.0)) == (0, {})
    assert not world.engine.has_request("r")
    world.close()


@pytest.mark.parametrize("place", ["", "chat-9"])
async def test_without_a_known_place_it_takes_the_least_loaded(place: str) -> None:
    world = World()
    world.start(place)
    assert world.peers.at("/a")
    assert world.keeper.moves.recent(100.0) == {"hr-g1-r": "a"}, "the router is told where it is"
    world.close()


async def test_a_place_that_refuses_is_passed_over_and_nothing_counts_as_lost() -> None:
    world = World()
    stream = world.start("b")
    world.peers.give_back("/b")
    [request] = world.peers.at("/a")
    assert request.placed is not None
    assert request.placed.replica_id == "a", "its host counts it as its own"
    world.give("/a", 5)
    assert (stream.hosts, world.metrics.num_resumed["engine_lost"]) == ([], 0)
    assert world.metrics.resume_gap.total == 0
    world.close()


async def test_a_lost_host_is_a_resumption_and_the_slot_moves() -> None:
    world = World()
    stream = world.start("b")
    world.give("/b", 5)
    world.peers.die("/b")
    [request] = world.peers.at("/a")
    assert request.resume_from == [5]
    assert (stream.hosts, world.metrics.num_resumed["engine_lost"]) == (["a"], 1)
    assert world.keeper.moves.recent(100.0) == {"hr-g1-r": "a"}
    world.give("/a", 6, finish_reason="length")
    assert stream.token_ids == [5, 6]
    assert world.keeper.moves.recent(100.0) == {}
    world.close()


async def test_all_replicas_lost_and_one_back_under_its_name_goes_on() -> None:
    world = World()
    stream = world.start("b")
    world.give("/b", 5)
    world.peers.die("/b")
    world.peers.die("/a")
    world.know()
    world.tick(30.0)
    assert (stream.error, world.keeper.num_waiting) == (None, 1)
    world.know("b")
    world.tick()
    [request] = world.peers.at("/b")
    assert request.resume_from == [5]
    world.close()


async def test_with_no_replica_for_too_long_it_ends_with_an_error() -> None:
    world = World()
    world.know()
    stream = world.start("b")
    world.tick(59.0)
    assert stream.error is None
    world.tick(1.1)
    assert stream.error is not None
    assert "no replica began it" in stream.error.message
    world.close()


async def test_a_stream_without_a_token_may_begin_in_another_version_and_one_with_tokens_may_not() -> None:
    world = World()
    fresh, begun = world.start("b", "fresh"), world.start("b", "begun")
    [_, request] = world.peers.at("/b")
    world.peers.give("/b", StepOutput(request.request_id, [5]))
    world.know("c", stream_class="B")
    world.peers.die("/b")
    assert [each.request_id for each in world.peers.at("/c")] == ["fresh@3"]
    assert world.peers.at("/c")[0].stream_class == "B"
    assert (fresh.error, begun.error, world.keeper.num_waiting) == (None, None, 1)
    world.close()


async def test_a_request_that_breaks_every_engine_ends_after_a_few() -> None:
    world = World()
    stream = world.start("b")
    num_lost = 0
    while stream.error is None:
        [path] = {path for path, _ in world.peers.hosted}
        world.peers.die(path)
        num_lost += 1
        assert num_lost <= MAX_CRASHES
        world.tick(1.1)
    assert num_lost == MAX_CRASHES
    assert "no token in between" in stream.error.message
    world.close()


async def test_a_client_that_leaves_takes_its_stream_from_the_host() -> None:
    world = World()
    stream = world.start("b")
    world.engine.abort("r")
    world.engine.abort("unknown")
    assert world.peers.aborted == [("/b", "r@1")]
    assert (stream.error, world.keeper.has_request("r")) == (None, False)
    world.close()


async def test_a_request_that_is_sent_again_gets_nothing_of_its_try_that_was_broken_off() -> None:
    world = World()
    world.start("b")
    [broken_off] = world.peers.at("/b")
    world.engine.abort("r")  # HAProxy's connection broke, and it sends the request again
    again = world.start("b")
    world.peers.give("/b", StepOutput(broken_off.request_id, [91]))  # of the step that ran meanwhile
    assert again.token_ids == []
    world.give("/b", 91)
    assert again.token_ids == [91]
    world.close()


async def test_replicas_of_another_text_are_none_of_its_own() -> None:
    world = World()
    world.know("a", text_class="other")
    stream = world.start("a")
    assert (world.peers.hosted, world.keeper.num_waiting, stream.error) == ({}, 1, None)
    world.close()


async def test_what_requests_are_checked_against_is_what_any_replica_can() -> None:
    world = World()
    world.engine.set_siblings(
        [
            make_sibling("a", text_class=TEXT, vocab_size=100, max_context_tokens=80),
            make_sibling("b", text_class=TEXT, vocab_size=100, max_context_tokens=40),
            make_sibling("c", text_class=TEXT, state="starting"),
        ]
    )
    assert world.engine.info is not None
    assert (world.engine.info.vocab_size, world.engine.info.max_context_tokens) == (100, 40)
    world.know()
    assert world.engine.state == "ready", "others like them will come"
    world.close()


async def test_a_request_waits_for_the_first_replica_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    engine = RemoteEngine(SPEC, world.keeper)
    waiting = asyncio.create_task(engine.wait_known())
    await asyncio.sleep(0)
    assert not waiting.done()
    engine.set_siblings([make_sibling("a", text_class=TEXT, vocab_size=9, max_context_tokens=9)])
    await waiting
    monkeypatch.setattr(remote_engine, "KNOWN_LIMIT_S", 0.01)
    late = RemoteEngine(SPEC, world.keeper)
    await late.wait_known()
    assert (late.state, late.info) == ("starting", None)
    world.close()


async def test_choices_of_one_prompt_tell_its_head_once() -> None:
    world = World()
    record = RequestRecord("hr-g1-7", "mine", "/v1/completions", 0.0, "acme")
    body = b'{"prompt":"' + b"word " * 200 + b'"}'
    requests = [GenerationRequest(f"hr-g1-7#{k}", [1, 2], SamplingParams()) for k in range(2)]
    first, second = world.engine.mark(requests, record, "chat-1", body)
    assert first.placed is not None
    assert second.placed is not None
    assert (first.placed.request_id, first.placed.replica_id) == ("hr-g1-7", "chat-1")
    assert first.placed.prefix_hashes
    assert (second.placed.request_id, second.placed.prefix_hashes) == ("hr-g1-7", [])
    other = msgspec.structs.replace(requests[1], prompt_token_ids=[3])
    marked = world.engine.mark([requests[0], other], record, "", body)
    assert all(each.placed is not None and not each.placed.prefix_hashes for each in marked)
    world.close()


@pytest.mark.parametrize(
    ("value", "is_trusted", "place"),
    [
        ("chat-1", True, "chat-1"),
        ("chat-1", False, ""),
        ("", True, ""),
        ("a b", True, ""),
        ("x" * 999, True, ""),
    ],
)
def test_a_place_is_believed_from_gateways_alone(value: str, is_trusted: bool, place: str) -> None:
    headers = {"x-headrace-place": value}
    request = HttpRequest("POST", "/v1/completions", headers, b"", 0.0, False, True, is_trusted)
    assert place_of(request) == place
