"""HTTP/2 connections over a transport in memory and a virtual clock; another implementation is the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.replica.test_http_connection import MemoryTransport, Owner

from headrace.replica import http2_frames as frames
from headrace.replica.http2_connection import Http2Connection
from headrace.replica.http2_frames import PREFACE, ErrorCode, Setting
from headrace.replica.http2_heads import AnswerBlocks
from headrace.replica.http2_hpack import encode_field
from headrace.replica.http_connection import HttpConnection
from headrace.replica.http_entry import HttpEntry
from headrace.replica.http_messages import HttpLimits

HEAD = [(":method", "POST"), (":scheme", "http"), (":path", "/echo"), (":authority", "test")]
WAIT = [(":method", "GET"), (":scheme", "http"), (":path", "/wait"), (":authority", "test")]
GATEWAY = ("x-headrace-request-id", "hr-g1-1")
EMPTY_SETTINGS = frames.pack_settings({})


class Transport(MemoryTransport):
    """Counts writes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_writes = 0
        self.on_write: Callable[[], None] = lambda: None

    def write(self, data: Any) -> None:
        self.num_writes += 1
        super().write(data)
        self.on_write()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class Loop:
    """The event loop's next turn."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.due.append(callback)

    def run(self) -> None:
        while self.due:
            due, self.due = self.due, []
            for callback in due:
                callback()


class Wire:
    """A connection, and a client on its other end."""

    def __init__(self, is_greeted: bool = True, **limits: Any) -> None:
        self.owner = Owner(HttpLimits(**limits))
        self.transport = Transport()
        self.loop = Loop()
        self.connection = Http2Connection(self.owner, AnswerBlocks(self.owner.heads), self.loop.call_soon)
        self.connection.connection_made(self.transport)
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.client = h2.connection.H2Connection(config)
        self._num_read = 0
        self.events: list[Any] = []
        if is_greeted:
            self.client.initiate_connection()
            assert self.client.data_to_send(24) == PREFACE
            self.turn()

    def turn(self) -> list[Any]:
        """Let both sides read what the other wrote; return the client's events."""
        events: list[Any] = []
        while True:
            sent = self.client.data_to_send()
            if sent:
                self.connection.data_received(sent)
            self.loop.run()
            new, self._num_read = self.transport.written[self._num_read :], len(self.transport.written)
            if not sent and not new:
                self.events += events
                return events
            events += self.client.receive_data(new) if new else []

    def raw(self, data: bytes) -> bytes:
        """Send bytes past the client; return what is written."""
        before = len(self.transport.written)
        self.connection.data_received(data)
        self.loop.run()
        return self.transport.written[before:]

    def request(self, head: list[tuple[str, str]], body: bytes | None = None) -> int:
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, head, end_stream=body is None)
        if body is not None:
            while len(body) > 16_384:
                self.client.send_data(stream_id, body[:16_384])
                body = body[16_384:]
            self.client.send_data(stream_id, body, end_stream=True)
        return stream_id

    def wait_request(self, *more: tuple[str, str]) -> int:
        stream_id = self.request([*WAIT, *more])
        self.turn()
        return stream_id

    def answer(self, stream_id: int) -> tuple[dict[str, str], bytes]:
        """Return (headers, body) of a stream's whole answer."""
        mine = [event for event in self.events if getattr(event, "stream_id", None) == stream_id]
        heads = [event for event in mine if isinstance(event, h2.events.ResponseReceived)]
        body = b"".join(event.data for event in mine if isinstance(event, h2.events.DataReceived))
        return dict(heads[0].headers), body

    def pass_time(self, seconds: float) -> list[Any]:
        self.owner.clock.advance(seconds)
        self.connection.check_time_limits(self.owner.clock.now_s())
        return self.turn()


def kinds(events: list[Any]) -> list[str]:
    return [type(event).__name__ for event in events]


def read_frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return (kind, flags, stream, payload) of whole frames."""
    found, at = [], 0
    while at < len(data):
        word, flags, stream_id = frames.FRAME_HEADER.unpack_from(data, at)
        at += 9 + (word >> 8)
        found.append((word & 0xFF, flags, stream_id, data[at - (word >> 8) : at]))
    assert at == len(data)
    return found


def goaway_code(data: bytes) -> int | None:
    codes = [payload[7] for kind, _, _, payload in read_frames(data) if kind == frames.GOAWAY]
    return codes[-1] if codes else None


def head_block(*fields: tuple[str, str]) -> bytes:
    return b"".join(encode_field(name, value) for name, value in fields)


# ---- requests and answers


def test_a_request_is_read_and_answered_as_on_http_1_1() -> None:
    wire = Wire()
    stream_id = wire.request(
        [*HEAD[:2], (":path", "/echo?a=b"), HEAD[3], ("X-Thing".lower(), "yes")], b"hello"
    )
    wire.turn()
    headers, body = wire.answer(stream_id)
    assert body == b"5 bytes to /echo"
    assert headers[":status"] == "200"
    assert headers["content-length"] == str(len(body))
    assert headers["content-type"] == "application/json"
    request = wire.owner.requests[0]
    assert (request.method, request.path, request.body) == ("POST", "/echo", b"hello")
    assert request.headers == {"host": "test", "x-thing": "yes"}
    assert not wire.connection.streams


def test_streams_of_one_turn_go_out_in_one_write() -> None:
    wire = Wire()
    for _ in range(5):
        wire.wait_request()
    responders = list(wire.owner.waiting)
    for responder in responders:
        responder.write(responder.start("x-a: b\r\n"), b"data: 1\n\n")
    before = wire.transport.num_writes
    wire.loop.run()
    assert wire.transport.num_writes == before + 1
    for responder in responders:
        responder.end(b"", b"data: 2\n\n")
    wire.loop.run()
    assert wire.transport.num_writes == before + 2
    events = wire.turn()
    assert kinds(events).count("StreamEnded") == 5
    headers, body = wire.answer(9)
    assert headers["x-a"] == "b"
    assert headers["content-type"].startswith("text/event-stream")
    assert body == b"data: 1\n\ndata: 2\n\n"


@given(st.lists(st.integers(1, 400), max_size=20))
def test_answers_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    whole, cut = Wire(), Wire()
    for wire in (whole, cut):
        for index in range(3):
            wire.request([*HEAD, ("x-number", str(index))], b"x" * 300 * index)
    data = whole.client.data_to_send()
    assert data == cut.client.data_to_send()
    whole.connection.data_received(data)
    for size in [*cuts, len(data)]:
        cut.connection.data_received(data[:size])
        data = data[size:]
    for wire in (whole, cut):
        wire.loop.run()
    assert cut.owner.requests == whole.owner.requests
    assert len(cut.owner.requests) == 3
    assert read_frames(cut.transport.written) == read_frames(whole.transport.written)


def test_a_head_request_gets_no_body() -> None:
    wire = Wire()
    stream_id = wire.request([(":method", "HEAD"), *HEAD[1:]])
    wire.turn()
    headers, body = wire.answer(stream_id)
    assert headers["content-length"] == "16"
    assert body == b""


def test_a_long_head_in_several_frames_is_taken() -> None:
    wire = Wire(max_head_bytes=100_000)
    stream_id = wire.request([*HEAD, *((f"x-{index}", "v" * 1000) for index in range(40))], b"")
    wire.turn()
    assert wire.answer(stream_id)[0][":status"] == "200"
    assert len(wire.owner.requests[0].headers) == 41


def test_trailers_end_a_request() -> None:
    wire = Wire()
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_headers(stream_id, HEAD)
    wire.client.send_data(stream_id, b"body")
    wire.client.send_headers(stream_id, [("x-sum", "1")], end_stream=True)
    wire.turn()
    assert wire.owner.requests[0].body == b"body"


def test_100_continue_is_sent_when_it_is_asked_for() -> None:
    wire = Wire()
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_headers(stream_id, [*HEAD, ("expect", "100-continue")])
    assert "InformationalResponseReceived" in kinds(wire.turn())
    wire.client.send_data(stream_id, b"x", end_stream=True)
    wire.turn()
    assert wire.answer(stream_id)[0][":status"] == "200"


def test_padding_and_priority_are_ignored() -> None:
    wire = Wire()
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_headers(stream_id, HEAD, priority_weight=10, priority_depends_on=0)
    wire.client.send_data(stream_id, b"abc", pad_length=200, end_stream=True)
    wire.client.prioritize(stream_id, weight=5)
    wire.turn()
    assert wire.owner.requests[0].body == b"abc"


def test_unknown_frames_and_settings_are_ignored() -> None:
    wire = Wire()
    assert wire.raw(frames.pack_frame(0x42, 0xFF, 7, b"anything")) == b""
    answer = read_frames(wire.raw(frames.pack_frame(frames.SETTINGS, 0, 0, b"\x42\x42\0\0\0\1")))
    assert [(kind, flags) for kind, flags, _, _ in answer] == [(frames.SETTINGS, frames.ACK)]


def test_pings_are_answered() -> None:
    wire = Wire()
    wire.client.ping(b"12345678")
    assert "PingAckReceived" in kinds(wire.turn())


# ---- bodies


def test_a_long_body_comes_in_through_the_windows() -> None:
    wire = Wire()
    body, stream_id = bytes(range(256)) * 20_000, wire.client.get_next_available_stream_id()
    wire.client.send_headers(stream_id, HEAD)
    rest = body
    while rest:
        size = min(wire.client.local_flow_control_window(stream_id), 16_384, len(rest))
        assert size > 0, "the server does not open its window again"
        wire.client.send_data(stream_id, rest[:size], end_stream=size == len(rest))
        rest = rest[size:]
        wire.turn()
    assert wire.owner.requests[0].body == body
    assert wire.owner.num_receiving == 0


def test_a_body_longer_than_the_limit_is_refused_before_it_is_read() -> None:
    wire = Wire(max_body_bytes=1000)
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_headers(stream_id, [*HEAD, ("content-length", "1001")])
    assert kinds(wire.turn())[-2:] == ["StreamEnded", "StreamReset"]
    assert wire.answer(stream_id)[0][":status"] == "413"
    assert wire.events[-1].error_code == ErrorCode.NO_ERROR
    assert not wire.owner.requests
    # The connection goes on, and bytes that were on their way are no error.
    late = frames.pack_frame(frames.DATA, frames.END_STREAM, stream_id, b"late")
    assert goaway_code(wire.raw(late)) is None
    other = wire.request(HEAD, b"")
    wire.turn()
    assert wire.answer(other)[0][":status"] == "200"


def test_a_body_without_a_length_is_refused_when_it_becomes_too_long() -> None:
    wire = Wire(max_body_bytes=1000)
    stream_id = wire.request(HEAD, b"x" * 1001)
    wire.turn()
    assert wire.answer(stream_id)[0][":status"] == "413"
    assert wire.owner.num_receiving == 0


def test_bodies_of_all_streams_together_are_bounded() -> None:
    wire = Wire(max_receiving_bytes=1500, max_body_bytes=1000)
    ids = [wire.client.get_next_available_stream_id()]
    wire.client.send_headers(ids[0], HEAD)
    wire.client.send_data(ids[0], b"x" * 1000)
    ids.append(wire.request(HEAD, b"x" * 600))
    wire.turn()
    assert wire.answer(ids[1])[0][":status"] == "503"
    wire.client.send_data(ids[0], b"", end_stream=True)
    wire.turn()
    assert wire.answer(ids[0])[1] == b"1000 bytes to /echo"
    assert wire.owner.num_receiving == 0


@pytest.mark.parametrize("length", ["3", "5", "-4", "4, 4", "x"])
def test_a_body_that_is_not_as_long_as_announced_resets_its_stream(length: str) -> None:
    wire = Wire()
    block = head_block(*HEAD, ("content-length", length))
    data = frames.pack_headers(1, block, is_end=False, max_frame_bytes=16_384)
    data += frames.pack_frame(frames.DATA, frames.END_STREAM, 1, b"four")
    answer = read_frames(wire.raw(data))
    assert (frames.RST_STREAM, 0, 1, b"\0\0\0\1") in answer
    assert not wire.owner.requests


# ---- leaving


def test_a_client_that_resets_its_stream_is_told_to_the_owner_of_the_answer_once() -> None:
    wire = Wire()
    stream_id, other_id = wire.wait_request(), wire.wait_request()
    gone: list[int] = []
    for index, responder in enumerate(wire.owner.waiting):
        responder.on_gone = lambda index=index: gone.append(index)
    wire.client.reset_stream(stream_id, error_code=8)
    wire.turn()
    assert gone == [0]
    wire.owner.waiting[0].write(b"", b"too late")
    wire.owner.waiting[0].end(b"", b"too late")
    assert wire.turn() == []
    wire.connection.connection_lost(None)
    assert gone == [0, 1]
    assert wire.owner.num_left == 1
    assert other_id == 3


def test_a_lost_connection_forgets_what_was_being_received() -> None:
    wire = Wire()
    wire.client.send_headers(1, HEAD)
    wire.client.send_data(1, b"x" * 500)
    wire.turn()
    assert wire.owner.num_receiving == 500
    wire.connection.connection_lost(None)
    assert wire.owner.num_receiving == 0


def test_a_leaving_server_finishes_its_streams_and_refuses_new_ones() -> None:
    wire = Wire()
    wire.wait_request()
    wire.connection.close_if_idle()
    assert "ConnectionTerminated" in kinds(wire.turn())
    block = head_block(*WAIT)
    answer = wire.raw(frames.pack_headers(3, block, is_end=True, max_frame_bytes=16_384))
    assert read_frames(answer) == [(frames.RST_STREAM, 0, 3, bytes((0, 0, 0, ErrorCode.REFUSED_STREAM)))]
    assert not wire.transport.has_eof
    wire.owner.waiting[0].send(200, b"done")
    wire.loop.run()
    assert wire.transport.has_eof


def test_an_idle_leaving_connection_closes_at_once() -> None:
    wire = Wire()
    wire.connection.close_if_idle()
    assert wire.transport.has_eof


def test_an_idle_connection_is_closed_after_its_time() -> None:
    wire = Wire(keep_alive_s=10.0)
    wire.pass_time(9.0)
    assert not wire.transport.has_eof
    wire.pass_time(2.0)
    assert wire.transport.has_eof


# ---- windows towards the client


class Greedy(Wire):
    """A client whose windows are what the test says."""

    def __init__(self, window: int, **limits: Any) -> None:
        super().__init__(is_greeted=False, **limits)
        self.raw(frames.pack_settings({Setting.INITIAL_WINDOW_SIZE: window}))

    def ask(self, stream_id: int, *more: tuple[str, str]) -> Any:
        block = head_block(*WAIT, *more)
        self.raw(frames.pack_headers(stream_id, block, is_end=True, max_frame_bytes=16_384))
        return self.owner.waiting[-1]

    def update(self, stream_id: int, num_bytes: int) -> bytes:
        return self.raw(frames.pack_window_update(stream_id, num_bytes))

    def pass_time(self, seconds: float) -> list[Any]:
        self.owner.clock.advance(seconds)
        self.connection.check_time_limits(self.owner.clock.now_s())
        return []

    def written(self) -> bytes:
        self.loop.run()
        new, self._num_read = self.transport.written[self._num_read :], len(self.transport.written)
        return new


def data_by_stream(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for kind, _, stream_id, payload in read_frames(data):
        if kind == frames.DATA:
            found[stream_id] = found.get(stream_id, b"") + payload
    return found


def test_a_stream_without_a_window_waits_and_delays_no_other() -> None:
    wire = Greedy(window=5)
    stalled, other = wire.ask(1), wire.ask(3)
    wire.update(3, 1000)
    stalled.write(stalled.start(), b"0123456789")
    other.write(other.start(), b"0123456789")
    assert data_by_stream(wire.written()) == {1: b"01234", 3: b"0123456789"}
    other.end(b"", b"end")
    assert data_by_stream(wire.written()) == {3: b"end"}
    assert data_by_stream(wire.update(1, 3)) == {1: b"567"}
    stalled.end(b"", b"end")
    last = wire.update(1, 100)
    assert data_by_stream(last) == {1: b"89end"}
    assert read_frames(last)[-1][1] == frames.END_STREAM
    assert not wire.connection.streams


def test_a_smaller_initial_window_may_make_a_window_negative() -> None:
    wire = Greedy(window=10)
    responder = wire.ask(1)
    responder.write(responder.start(), b"0123456789")
    wire.raw(frames.pack_settings({Setting.INITIAL_WINDOW_SIZE: 0}))
    responder.write(b"", b"abc")
    wire.written()
    assert data_by_stream(wire.update(1, 10)) == {}
    assert data_by_stream(wire.update(1, 2)) == {1: b"ab"}
    assert data_by_stream(wire.raw(frames.pack_settings({Setting.INITIAL_WINDOW_SIZE: 50}))) == {1: b"c"}


def test_the_connections_window_is_shared_by_turns() -> None:
    wire = Greedy(window=1 << 20)
    responders = [wire.ask(1), wire.ask(3)]
    for responder in responders:
        responder.send(200, bytes(100_000))
    assert sum(map(len, data_by_stream(wire.written()).values())) == 65_535
    more = data_by_stream(wire.update(0, 60_000))
    assert sum(map(len, more.values())) == 60_000
    assert set(more) == {1, 3}, "one stream took all of it"
    wire.update(0, 1 << 20)
    sizes = {1: 0, 3: 0}
    for stream_id, data in data_by_stream(wire.transport.written).items():
        sizes[stream_id] += len(data)
    assert sizes == {1: 100_000, 3: 100_000}
    assert not wire.connection.streams


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "stream", "connection"]), st.integers(1, 40_000)), max_size=40
    )
)
def test_no_window_is_overrun_and_nothing_is_lost(steps: list[tuple[str, int]]) -> None:
    wire = Greedy(window=1000)
    responder = wire.ask(1)
    responder.write(responder.start(), b"")
    stream_window, window, given, got = 1000, 65_535, b"", b""
    for what, size in steps:
        if what == "write":
            data = bytes((len(given) + i) % 251 for i in range(size))
            given += data
            responder.write(b"", data)
            answer = wire.written()
        elif what == "stream":
            stream_window += size
            answer = wire.update(1, size)
            wire.written()
        else:
            window += size
            answer = wire.update(0, size)
            wire.written()
        sent = data_by_stream(answer).get(1, b"")
        stream_window, window, got = stream_window - len(sent), window - len(sent), got + sent
        assert stream_window >= 0
        assert window >= 0
    assert given.startswith(got)
    assert len(got) == len(given) or min(stream_window, window) == 0
    wire.update(1, 1 << 22)
    wire.update(0, 1 << 22)
    assert data_by_stream(wire.transport.written).get(1, b"") == given


def test_a_stream_with_too_much_unread_is_reset_and_told() -> None:
    wire = Greedy(window=0, max_write_buffer_bytes=1000)
    responder = wire.ask(1)
    gone: list[bool] = []
    responder.on_gone = lambda: gone.append(True)
    responder.write(responder.start(), b"x" * 1001)
    assert not gone, "a single write may be longer"
    responder.write(b"", b"x")
    assert gone == [True]
    assert read_frames(wire.written())[-1] == (frames.RST_STREAM, 0, 1, bytes((0, 0, 0, ErrorCode.CANCEL)))


def test_a_stream_that_makes_no_progress_is_reset_in_time() -> None:
    wire = Greedy(window=0, write_stall_s=30.0)
    responder = wire.ask(1)
    responder.write(responder.start(), b"abc")
    wire.pass_time(29.0)
    assert not responder.is_done
    wire.update(1, 1)
    wire.pass_time(29.0)
    assert not responder.is_done
    wire.pass_time(2.0)
    assert responder.is_done


def test_a_gateways_stream_ends_before_the_gateway_would_block_its_other_streams() -> None:
    wire = Greedy(window=1 << 20, max_shared_stream_bytes=10_000)
    own, shared = wire.ask(1), wire.ask(3, GATEWAY)
    for responder in (own, shared):
        responder.write(responder.start(), b"")
        for _ in range(10):
            responder.write(b"", bytes(1000))
    assert not shared.is_done
    for responder in (own, shared):
        responder.write(b"", b"x")
    assert shared.is_done
    assert not own.is_done
    assert len(data_by_stream(wire.written())[3]) <= 10_001


def test_a_socket_that_takes_nothing_holds_answers_back_until_it_does() -> None:
    wire = Greedy(window=1 << 20)
    responder = wire.ask(1)
    wire.connection.pause_writing()
    responder.write(responder.start(), b"abc")
    assert data_by_stream(wire.written()) == {}
    wire.connection.resume_writing()
    assert data_by_stream(wire.written()) == {1: b"abc"}


def test_what_fills_the_socket_in_one_turn_does_not_cut_the_connection() -> None:
    # A front that was held up for some steps writes megabytes for hundreds of streams at once; the transport
    # says during that very write that it is full.
    wire = Greedy(window=1 << 20)
    wire.connection.push(bytes(4 * 1024 * 1024))
    wire.transport.on_write = wire.connection.pause_writing
    wire.loop.run()
    assert wire.connection.is_holding
    assert not wire.transport.is_aborted


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    wire = Greedy(window=1 << 20, write_stall_s=30.0)
    wire.transport.num_unread = 100
    wire.connection.pause_writing()
    wire.pass_time(31.0)
    assert wire.transport.is_aborted

    wire = Greedy(window=0)
    wire.connection.pause_writing()
    for _ in range(70):
        wire.raw(frames.pack_frame(frames.PING, 0, 0, b"12345678") * 1000)
        wire.connection.check_time_limits(wire.owner.clock.now_s())
    assert wire.transport.is_aborted, "answers to pings are not bounded"


# ---- what is not allowed

SETTINGS_5 = frames.pack_frame(frames.SETTINGS, 0, 0, b"\0\5\0\0\0\1")
BAD: list[tuple[bytes, ErrorCode]] = [
    (frames.pack_frame(frames.DATA, 0, 1, b"x"), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.HEADERS, 5, 2, head_block(*WAIT)), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.HEADERS, 5, 0, head_block(*WAIT)), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.HEADERS, 5, 1, b"\x80"), ErrorCode.COMPRESSION_ERROR),
    (frames.pack_frame(frames.HEADERS, 0xD, 1, b"\xff"), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.HEADERS, 0x25, 1, b"abc"), ErrorCode.FRAME_SIZE_ERROR),
    (frames.pack_frame(frames.CONTINUATION, 4, 1), ErrorCode.PROTOCOL_ERROR),
    (
        frames.pack_frame(frames.HEADERS, 1, 1, b"") + frames.pack_frame(frames.PING, 0, 0, b"12345678"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    (frames.pack_frame(frames.PUSH_PROMISE, 4, 1, b"1234"), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.PING, 0, 0, b"1234567"), ErrorCode.FRAME_SIZE_ERROR),
    (frames.pack_frame(frames.PING, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.PRIORITY, 0, 0, b"12345"), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.RST_STREAM, 0, 1, b"123"), ErrorCode.FRAME_SIZE_ERROR),
    (frames.pack_frame(frames.RST_STREAM, 0, 1, b"1234"), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.SETTINGS, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR),
    (frames.pack_frame(frames.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.SETTINGS, 1, 0, b"123456"), ErrorCode.FRAME_SIZE_ERROR),
    (SETTINGS_5, ErrorCode.PROTOCOL_ERROR),
    (frames.pack_settings({Setting.ENABLE_PUSH: 2}), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_settings({Setting.INITIAL_WINDOW_SIZE: 1 << 31}), ErrorCode.FLOW_CONTROL_ERROR),
    (frames.pack_window_update(0, 0), ErrorCode.FLOW_CONTROL_ERROR),
    (frames.pack_window_update(0, (1 << 31) - 1), ErrorCode.FLOW_CONTROL_ERROR),
    (frames.pack_window_update(1, 1), ErrorCode.PROTOCOL_ERROR),
    (frames.pack_frame(frames.WINDOW_UPDATE, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR),
    (frames.pack_frame(frames.GOAWAY, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    (b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", ErrorCode.FRAME_SIZE_ERROR),
]


@pytest.mark.parametrize(("data", "code"), BAD, ids=range(len(BAD)))
def test_a_broken_protocol_ends_the_connection_with_the_right_code(data: bytes, code: ErrorCode) -> None:
    wire = Wire()
    assert goaway_code(wire.raw(data)) == code
    assert wire.transport.has_eof
    assert wire.raw(EMPTY_SETTINGS) == b""
    wire.pass_time(10.0)
    assert wire.transport.is_aborted


def test_the_first_frame_must_be_settings() -> None:
    wire = Wire(is_greeted=False)
    assert (
        goaway_code(wire.raw(frames.pack_frame(frames.PING, 0, 0, b"12345678"))) == ErrorCode.PROTOCOL_ERROR
    )


MALFORMED = [
    [*HEAD, ("Upper", "x")],
    [*HEAD, ("connection", "close")],
    [*HEAD, ("transfer-encoding", "chunked")],
    [*HEAD, ("te", "gzip")],
    [*HEAD, ("x", "a\r\nb: c")],
    [*HEAD, ("x", " a")],
    [*HEAD, ("x y", "a")],
    [*HEAD, ("", "a")],
    [*HEAD, (":path", "/twice")],
    [*HEAD, (":status", "200")],
    [("x", "y"), *HEAD],
    HEAD[1:],
    [HEAD[0], *HEAD[2:]],
    [*HEAD[:2], (":path", ""), HEAD[3]],
    [*HEAD[:2], (":path", "relative"), HEAD[3]],
    [*HEAD[:2], (":path", "/a b"), HEAD[3]],
    [(":method", "GE T"), *HEAD[1:]],
    [*HEAD, ("content-length", "1"), ("content-length", "2")],
]


@pytest.mark.parametrize("fields", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_head_resets_its_stream_alone(fields: list[tuple[str, str]]) -> None:
    wire = Wire()
    data = frames.pack_headers(1, head_block(*fields), is_end=True, max_frame_bytes=16_384)
    assert read_frames(wire.raw(data)) == [
        (frames.RST_STREAM, 0, 1, bytes((0, 0, 0, ErrorCode.PROTOCOL_ERROR)))
    ]
    assert not wire.owner.requests
    good = frames.pack_headers(3, head_block(*HEAD), is_end=True, max_frame_bytes=16_384)
    wire.raw(good)
    assert len(wire.owner.requests) == 1


def test_a_head_that_is_too_long_is_told_so_and_the_connection_goes_on() -> None:
    wire = Wire(max_head_bytes=2000)
    long_id = wire.request([*HEAD, ("x", "v" * 3000)], b"")
    good_id = wire.request(HEAD, b"")
    wire.turn()
    assert wire.answer(long_id)[0][":status"] == "413"
    assert wire.answer(good_id)[0][":status"] == "200"


def test_an_endless_head_ends_the_connection() -> None:
    wire = Wire(max_head_bytes=2000)
    data = frames.pack_frame(frames.HEADERS, 0, 1, b"\0" * 100)
    data += frames.pack_frame(frames.CONTINUATION, 0, 1, b"\0" * 1000) * 10
    assert goaway_code(wire.raw(data)) == ErrorCode.ENHANCE_YOUR_CALM
    wire = Wire()
    data = frames.pack_frame(frames.HEADERS, 0, 1) + frames.pack_frame(frames.CONTINUATION, 0, 1) * 100
    assert goaway_code(wire.raw(data)) == ErrorCode.ENHANCE_YOUR_CALM


def test_half_a_head_times_out() -> None:
    wire = Wire(head_timeout_s=30.0)
    wire.raw(frames.pack_frame(frames.HEADERS, 0, 1, b""))
    wire.pass_time(31.0)
    assert wire.transport.has_eof


def test_half_a_body_times_out() -> None:
    wire = Wire(body_idle_timeout_s=30.0)
    stream_id = wire.client.get_next_available_stream_id()
    wire.client.send_headers(stream_id, HEAD)
    wire.client.send_data(stream_id, b"x")
    wire.turn()
    wire.pass_time(31.0)
    assert wire.answer(stream_id)[0][":status"] == "408"
    assert wire.owner.num_receiving == 0


@pytest.mark.parametrize("frame", [
    frames.pack_frame(frames.PING, 0, 0, b"12345678"),
    EMPTY_SETTINGS,
    frames.pack_frame(frames.PRIORITY, 0, 1, b"12345"),
    frames.pack_frame(0x42, 0, 0),
    frames.pack_frame(frames.DATA, 0, 1),
    frames.pack_frame(frames.DATA, frames.PADDED, 1, b"\0"),
], ids=["ping", "settings", "priority", "unknown", "empty data", "padding alone"])  # fmt: skip
def test_frames_that_carry_nothing_are_bounded(frame: bytes) -> None:
    wire = Wire(max_control_frames=500)
    wire.raw(frames.pack_headers(1, head_block(*HEAD), is_end=False, max_frame_bytes=16_384))
    assert goaway_code(wire.raw(frame * 480)) is None
    wire.pass_time(0.5)
    assert goaway_code(wire.raw(frame * 480)) is None
    assert goaway_code(wire.raw(frame * 40)) == ErrorCode.ENHANCE_YOUR_CALM


def test_a_rapid_reset_costs_no_more_requests_per_turn_than_streams_may_be_open() -> None:
    wire = Wire(max_streams=10)
    block = head_block(*WAIT)
    data = b"".join(
        frames.pack_headers(2 * index + 1, block, is_end=True, max_frame_bytes=16_384)
        + frames.pack_reset(2 * index + 1, ErrorCode.CANCEL)
        for index in range(100)
    )
    answer = read_frames(wire.raw(data))
    assert len(wire.owner.requests) == 10
    refused = [payload for kind, _, _, payload in answer if kind == frames.RST_STREAM]
    assert refused == [bytes((0, 0, 0, ErrorCode.REFUSED_STREAM))] * 90
    wire.raw(frames.pack_headers(201, block, is_end=True, max_frame_bytes=16_384))
    assert len(wire.owner.requests) == 11


def test_more_streams_than_offered_are_refused() -> None:
    wire = Wire(max_streams=2)
    block = head_block(*WAIT)
    for stream_id in (1, 3):
        wire.raw(frames.pack_headers(stream_id, block, is_end=True, max_frame_bytes=16_384))
    answer = read_frames(wire.raw(frames.pack_headers(5, block, is_end=True, max_frame_bytes=16_384)))
    assert answer == [(frames.RST_STREAM, 0, 5, bytes((0, 0, 0, ErrorCode.REFUSED_STREAM)))]
    wire.owner.waiting[0].send(200, b"")
    wire.raw(frames.pack_headers(7, block, is_end=True, max_frame_bytes=16_384))
    assert len(wire.owner.requests) == 3


# ---- bytes that mean nothing


@given(st.binary(max_size=400))
def test_no_bytes_break_a_connection(data: bytes) -> None:
    wire = Wire()
    wire.raw(data)
    wire.connection.connection_lost(None)
    assert wire.owner.num_receiving == 0


FRAMES = st.builds(
    frames.pack_frame, st.integers(0, 10), st.integers(0, 255), st.integers(0, 7), st.binary(max_size=40)
)


@given(st.lists(FRAMES, max_size=30))
def test_no_frames_break_a_connection(parts: list[bytes]) -> None:
    wire = Wire(max_streams=3, max_body_bytes=100)
    for part in parts:
        wire.raw(part)
        assert len(wire.connection.streams) <= 3
    wire.connection.connection_lost(None)
    assert not wire.connection.streams
    assert wire.owner.num_receiving == 0


def test_every_frame_cut_at_every_byte_waits_for_the_rest() -> None:
    whole = [
        EMPTY_SETTINGS,
        frames.pack_frame(frames.PING, 0, 0, b"12345678"),
        frames.pack_window_update(0, 5),
        frames.pack_headers(1, head_block(*HEAD), is_end=False, max_frame_bytes=16_384),
        frames.pack_frame(frames.DATA, frames.PADDED | frames.END_STREAM, 1, b"\3abc\0\0\0"),
        frames.pack_reset(1, ErrorCode.CANCEL),
    ]
    for position, frame in enumerate(whole):
        for end in range(len(frame)):
            wire = Wire()
            wire.raw(b"".join(whole[:position]))
            assert wire.raw(frame[:end]) == b""
            assert goaway_code(wire.raw(frame[end:])) is None
            assert not wire.transport.has_eof


# ---- which protocol it is


class Entry:
    """A connection whose protocol is not known yet."""

    def __init__(self, **limits: Any) -> None:
        self.owner = Owner(HttpLimits(**limits))
        self.loop = Loop()
        self.transport = Transport()
        self.protocol: Any = HttpEntry(
            self.owner,
            lambda: HttpConnection(self.owner),
            lambda: Http2Connection(self.owner, AnswerBlocks(self.owner.heads), self.loop.call_soon),
        )
        self.transport.set_protocol = self._set_protocol  # type: ignore[method-assign]
        self.protocol.connection_made(self.transport)

    def _set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def send(self, data: bytes) -> None:
        self.protocol.data_received(data)
        self.loop.run()


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_the_first_bytes_decide_the_protocol(step: int) -> None:
    head = frames.pack_headers(1, head_block(*HEAD), is_end=True, max_frame_bytes=16_384)
    for data, protocol in (
        (PREFACE + EMPTY_SETTINGS + head, Http2Connection),
        (b"POST /echo HTTP/1.1\r\ncontent-length: 0\r\n\r\n", HttpConnection),
        (b"PRI /echo HTTP/1.1\r\n\r\n", HttpConnection),
    ):
        entry = Entry()
        for at in range(0, len(data), step):
            entry.send(data[at : at + step])
        assert isinstance(entry.protocol, protocol)
        if data[:4] != b"PRI ":
            assert entry.owner.requests[0].path == "/echo"
        assert entry.owner.num_left == 1, "the entry itself stays counted"


def test_half_a_preface_times_out() -> None:
    entry = Entry(head_timeout_s=30.0)
    entry.send(PREFACE[:10])
    entry.owner.clock.advance(31.0)
    entry.protocol.check_time_limits(entry.owner.clock.now_s())
    assert entry.transport.is_closed


def test_a_connection_too_many_is_told_so_in_its_protocol() -> None:
    entry = Entry()
    entry.owner.has_room = False
    entry.protocol.connection_made(entry.transport)
    assert b" 503 " in entry.transport.written
