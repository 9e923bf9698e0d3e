"""Answers: what is sent, and that each ends exactly once, whatever happens in which order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.replica.test_http_connection import Wire

from headrace.api.messages import (
    FinishedRequest,
    GenerationRequest,
    SamplingParams,
    StepOutput,
    TerminalState,
    TokenLogprobs,
)
from headrace.clock import VirtualClock
from headrace.errors import Overloaded, ReplicaLost
from headrace.observability.front_metrics import FrontMetrics
from headrace.replica.answer import Answer, AnswerServices, Choice, TextRules
from headrace.replica.answer_shape import AnswerShape
from headrace.replica.http_connection import Responder
from headrace.replica.ledger import Ledger, RequestRecord

BYTES = {i: bytes([i]) for i in range(256)}


class FakeEngine:
    """Keeps what is submitted."""

    def __init__(self) -> None:
        self.streams: dict[str, Choice] = {}
        self.aborted: list[str] = []

    def submit(self, request: GenerationRequest, stream: Choice) -> None:
        self.streams[request.request_id] = stream

    def has_request(self, request_id: str) -> bool:
        return request_id in self.streams

    def on_engine_lost(self, stream: Choice, reason: str) -> None:
        stream.fail(ReplicaLost(reason))

    def abort(self, request_id: str) -> None:
        if self.streams.pop(request_id, None) is not None:
            self.aborted.append(request_id)


class Listener:
    def __init__(self) -> None:
        self.finished: list[FinishedRequest] = []

    def on_busy(self) -> None: ...

    def on_end(self, finished: FinishedRequest) -> None:
        self.finished.append(finished)

    def write(self, fields: dict[str, Any]) -> None: ...


class World:
    """One answer between a client in memory and an engine that does as it is told."""

    def __init__(
        self, *, is_stream: bool, n: int = 1, stops: tuple[str, ...] = (), logprobs: int = -1
    ) -> None:
        self.wire = Wire()
        self.wire.send(b"POST /wait HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        self.responder: Responder = self.wire.owner.waiting[0]
        self.engine = FakeEngine()
        self.listener = Listener()
        self.metrics = FrontMetrics("chat", "chat-1")
        self.ledger = Ledger(self.metrics, self.listener, VirtualClock(), self.listener)
        record = RequestRecord("r", "r", "/v1/completions", 0.0, num_prompt_tokens=5)
        self.ledger.open(record)
        services = AnswerServices(self.engine, self.ledger, self.metrics)
        shape = AnswerShape("id", 1, "chat", "print", False, is_stream, False, n)
        self.answer = Answer(shape, record, self.responder, services, "")
        sampling = SamplingParams(num_logprobs=logprobs)
        requests = [GenerationRequest(f"r#{k}", [1], sampling) for k in range(n)]
        self.answer.submit(requests, TextRules(BYTES, stops))

    def step(self, index: int, text: bytes, reason: Any = None, **more: Any) -> None:
        """One step's output for choice `index`, and the flush after it."""
        stream = self.engine.streams.get(f"r#{index}")
        if stream is None:
            return
        if reason is not None:
            del self.engine.streams[f"r#{index}"]
        stream.on_output(StepOutput(f"r#{index}", list(text), reason, **more), 1.0)
        stream.flush()

    def lose_engine(self) -> None:
        streams, self.engine.streams = self.engine.streams, {}
        for stream in streams.values():
            stream.on_engine_lost("it died")

    @property
    def written(self) -> bytes:
        return self.wire.transport.written

    def body(self) -> bytes:
        """The body without its chunks' sizes. Raises if the chunks are not whole."""
        head, _, rest = self.written.partition(b"\r\n\r\n")
        if b"chunked" not in head:
            return rest
        body = b""
        while True:
            size, _, rest = rest.partition(b"\r\n")
            if size == b"0":
                assert rest == b"\r\n"
                return body
            num_bytes = int(size, 16)
            assert rest[num_bytes : num_bytes + 2] == b"\r\n"
            body, rest = body + rest[:num_bytes], rest[num_bytes + 2 :]

    def texts(self) -> dict[int, str]:
        """The text of each choice, as a client puts it together."""
        texts: dict[int, str] = {}
        for choice in self.choices():
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        return texts

    def choices(self) -> list[dict[str, Any]]:
        body = self.body()
        if not body.startswith(b"data: "):
            return list(json.loads(body)["choices"])
        events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
        assert events[-1] == b"[DONE]"
        return [choice for event in events[:-1] for choice in json.loads(event)["choices"]]

    @property
    def state(self) -> TerminalState:
        assert len(self.listener.finished) == 1, "exactly one end"
        return self.listener.finished[0].state


@pytest.mark.parametrize("is_stream", [True, False])
def test_text_of_several_choices_arrives_whole(is_stream: bool) -> None:
    world = World(is_stream=is_stream, n=2)
    world.step(0, b"he")
    world.step(1, "é".encode()[:1])
    world.step(1, "é".encode()[1:])
    world.step(0, b"llo", "stop")
    assert world.ledger.num_open == 1
    world.step(1, b"!", "length")
    assert world.texts() == {0: "hello", 1: "é!"}
    assert world.state is TerminalState.FINISHED
    assert world.listener.finished[0].num_output_tokens == 8


def test_each_step_is_one_write() -> None:
    world = World(is_stream=True)
    writes = []
    world.wire.connection.write = writes.append  # type: ignore[method-assign]
    world.step(0, b"ab")
    world.step(0, b"c", "stop")
    assert len(writes) == 2
    assert writes[0].startswith(b"HTTP/1.1 200 OK")
    assert writes[1].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_stop_string_aborts_the_engines_request(is_stream: bool) -> None:
    world = World(is_stream=is_stream, stops=("END",))
    for byte in b"one EN":
        world.step(0, bytes([byte]))
    world.step(0, b"D and more")
    assert world.engine.aborted == ["r#0"]
    assert world.texts() == {0: "one "}
    assert world.choices()[-1]["finish_reason"] == "stop"
    assert world.state is TerminalState.FINISHED


def test_engine_time_is_that_of_all_choices_however_each_ends() -> None:
    world = World(is_stream=True, n=3, stops=("STOP",))
    for index in range(3):
        world.step(index, b"a", engine_ns=1_000_000)
    world.step(0, b"b", "length", engine_ns=5_000_000)
    world.step(1, b"STOP", engine_ns=7_000_000)
    assert world.listener.finished == []
    world.step(2, b"", "stop", engine_ns=9_000_000)
    assert world.listener.finished[0].engine_s == pytest.approx(0.021)


def test_an_aborted_requests_engine_time_is_what_was_told_until_then() -> None:
    world = World(is_stream=True)
    world.step(0, b"a", engine_ns=3_000_000)
    world.step(0, b"b", engine_ns=4_000_000)
    world.wire.connection.connection_lost(None)
    assert [each.engine_s for each in world.listener.finished] == [pytest.approx(0.004)]


def test_logprobs_of_text_after_a_stop_string_are_left_out() -> None:
    world = World(is_stream=False, stops=("c",), logprobs=0)
    for byte in b"abcd":
        world.step(0, bytes([byte]), logprobs=[TokenLogprobs(-1.0)])
    assert world.choices()[0]["logprobs"]["tokens"] == ["a", "b"]


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("logprobs", [-1, 0])
@pytest.mark.parametrize("reason", [None, "length"])
def test_tokens_of_one_step_give_the_same_answer_as_tokens_one_by_one(
    is_stream: bool, logprobs: int, reason: Any
) -> None:
    """What comes behind a stop string is not in the text, the logprobs or the usage, however it came."""
    text = b"one END and"
    outcomes = []
    for sizes in ([1] * 11, [11], [2, 5, 4], [6, 5], [5, 6]):
        world = World(is_stream=is_stream, n=2, stops=("END",), logprobs=logprobs)
        start = 0
        for size in sizes:
            piece = text[start : start + size]
            entries = [TokenLogprobs(-float(byte)) for byte in piece] if logprobs >= 0 else None
            start += size
            world.step(0, piece, reason if start == len(text) else None, logprobs=entries)
        assert set(world.engine.streams) == {"r#1"}, "the engine goes on with what nobody reads"
        world.step(1, b"two", "stop", logprobs=[TokenLogprobs(-1.0)] * 3 if logprobs >= 0 else None)
        entries_sent = [
            pair
            for choice in world.choices()
            if choice["index"] == 0 and choice.get("logprobs")
            for pair in zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True)
        ]
        reasons = [choice["finish_reason"] for choice in world.choices() if choice["index"] == 0]
        outcomes.append(
            (world.texts(), entries_sent, reasons[-1], world.listener.finished[0].num_output_tokens)
        )
    assert outcomes[0][0] == {0: "one ", 1: "two"}
    assert outcomes[0][2:] == ("stop", len(b"one END") + len(b"two"))
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_tokens_that_come_together_have_one_gap_before_them() -> None:
    for stops in ((), ("never",)):
        world = World(is_stream=True, stops=stops)
        stream = world.engine.streams["r#0"]
        for now_s in (1.0, 1.5, 2.5):
            stream.on_output(StepOutput("r#0", list(b"abc")), now_s)
        latency = world.metrics.inter_token_latency
        assert (latency.cumulative()[-1][1], latency.total) == (2, 1.5)


def test_an_engine_error_before_the_first_token_is_an_http_status() -> None:
    world = World(is_stream=True)
    world.step(0, b"", "error", error="too large")
    assert world.written.startswith(b"HTTP/1.1 500 ")
    assert b"too large" in world.body()
    assert world.state is TerminalState.FAILED


def test_an_engine_error_after_the_first_token_is_an_event_without_done() -> None:
    world = World(is_stream=True, n=2)
    world.step(0, b"a")
    world.step(1, b"", "error", error="broken")
    assert world.engine.aborted == ["r#0"]
    assert b"[DONE]" not in world.body()
    assert json.loads(world.body().split(b"data: ")[-1])["error"]["code"] == "generation_failed"
    assert world.state is TerminalState.FAILED


def test_a_lost_engine_ends_all_choices_in_one_error() -> None:
    world = World(is_stream=True, n=3)
    world.step(0, b"a")
    world.lose_engine()
    assert world.body().count(b'"error"') == 1
    assert world.state is TerminalState.FAILED


def test_what_continues_a_choice_elsewhere_is_kept() -> None:
    world = World(is_stream=True)
    stream = world.engine.streams["r#0"]
    world.step(0, b"abc")
    world.step(0, b"d")
    assert isinstance(stream, Choice)
    assert (stream.request.prompt_token_ids, stream.token_ids) == ([1], list(b"abcd"))


EVENTS = st.one_of(
    st.tuples(
        st.just("step"), st.integers(0, 2), st.binary(max_size=4), st.sampled_from([None, None, "stop"])
    ),
    st.tuples(st.just("step"), st.integers(0, 2), st.just(b""), st.sampled_from(["error", "length", None])),
    st.sampled_from([("lose",), ("leave",), ("fail",)]),
)


@given(st.booleans(), st.sampled_from([(), ("a",), ("ab", "\ufffd")]), st.lists(EVENTS, max_size=15))
def test_an_answer_ends_exactly_once_whatever_happens(
    is_stream: bool, stops: tuple[str, ...], events: list[tuple[Any, ...]]
) -> None:
    world = World(is_stream=is_stream, n=3, stops=stops)
    for event in events:
        if event[0] == "step":
            world.step(event[1], event[2], event[3])
        elif event[0] == "lose":
            world.lose_engine()
        elif event[0] == "leave":
            world.wire.connection.connection_lost(None)
        else:
            world.answer.fail(Overloaded("leaving"))
        world.ledger.check_integrity()
        assert len(world.listener.finished) == (1 if world.answer.has_ended else 0)
    if not world.answer.has_ended:
        assert not world.responder.is_done
        return
    assert not world.engine.streams, "nothing runs on for an answer that has ended"
    if world.state is TerminalState.FINISHED:
        assert len(world.texts()) == 3
    elif world.state is TerminalState.FAILED:
        assert b'"error"' in world.body()
        assert b"[DONE]" not in world.written
