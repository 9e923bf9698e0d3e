"""HTTP/1.1 connections over a transport in memory and a virtual clock."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.clock import VirtualClock
from headrace.replica.http_connection import HttpConnection
from headrace.replica.http_messages import AnswerHeads, HttpLimits, HttpRequest
from headrace.replica.http_responder import Responder


class MemoryTransport(asyncio.Transport):
    """Keeps what is written. `num_unread` says how much of it the peer has not read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.num_unread = 0
        self.is_closed = self.is_aborted = self.has_eof = self.is_paused = False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_eof = True

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_closed or self.is_aborted

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class Owner:
    """Answers with what it got; `/wait` is left open."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.clock = VirtualClock(100.0)
        self.heads = AnswerHeads("", lambda: 0.0)
        self.requests: list[HttpRequest] = []
        self.waiting: list[Responder] = []
        self.has_room = True
        self.num_left = 0
        self.num_receiving = 0

    def joined(self, connection: HttpConnection) -> bool:
        return self.has_room

    def left(self, connection: HttpConnection) -> None:
        self.num_left += 1

    def reserve(self, num_bytes: int) -> bool:
        if self.num_receiving + num_bytes > self.limits.max_receiving_bytes:
            return False
        self.num_receiving += num_bytes
        return True

    def handle(self, request: HttpRequest, responder: Responder) -> None:
        self.requests.append(request)
        if request.path == "/wait":
            self.waiting.append(responder)
        else:
            responder.send(200, b"%d bytes to %b" % (len(request.body), request.path.encode()))


class Wire:
    """A connection with both of its ends."""

    def __init__(self, **limits: Any) -> None:
        self.owner = Owner(HttpLimits(**limits))
        self.transport = MemoryTransport()
        self.connection = HttpConnection(self.owner)
        self.connection.connection_made(self.transport)

    def send(self, data: bytes) -> bytes:
        """Receive `data`; return what was written since."""
        before = len(self.transport.written)
        self.connection.data_received(data)
        return self.transport.written[before:]

    def pass_time(self, seconds: float) -> bytes:
        before = len(self.transport.written)
        self.owner.clock.advance(seconds)
        self.connection.check_time_limits(self.owner.clock.now_s())
        return self.transport.written[before:]


def post(path: bytes, body: bytes, more: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (path, more, len(body), body)


def chunked(path: bytes, *chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST %b HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n" % (path, body)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


MESSAGES = [
    post(b"/one", b"x" * 100),
    b"GET /two?a=b HTTP/1.1\r\nX-Thing: yes\r\n\r\n",
    chunked(b"/three", b"abc", b"d" * 300),
    post(b"/four", b""),
    b"HEAD /five HTTP/1.1\r\n\r\n",
]
BAD_END = b"not http at all\r\n\r\n"


@given(
    st.lists(st.sampled_from(MESSAGES), max_size=5),
    st.booleans(),
    st.lists(st.integers(0, 2000), max_size=12),
)
def test_answers_do_not_depend_on_how_the_bytes_are_cut(
    messages: list[bytes], is_bad_at_end: bool, cuts: list[int]
) -> None:
    data = b"".join(messages) + (BAD_END if is_bad_at_end else b"")
    whole, cut = Wire(), Wire()
    whole.send(data)
    places = sorted({min(place, len(data)) for place in cuts} | {0, len(data)})
    for begin, end in pairwise(places):
        cut.send(data[begin:end])
    assert cut.transport.written == whole.transport.written
    assert len(whole.owner.requests) == len(messages)
    assert cut.owner.requests == whole.owner.requests
    assert whole.transport.has_eof == is_bad_at_end


@given(st.binary(max_size=300))
def test_no_bytes_break_a_connection(data: bytes) -> None:
    wire = Wire()
    wire.send(data)
    wire.send(data)
    wire.connection.connection_lost(None)
    assert wire.owner.num_receiving == 0


def test_a_request_is_parsed_with_lower_case_headers_and_without_its_query() -> None:
    wire = Wire()
    wire.send(MESSAGES[1])
    request = wire.owner.requests[0]
    assert (request.method, request.path, request.headers) == ("GET", "/two", {"x-thing": "yes"})


def test_trailers_are_not_headers() -> None:
    wire = Wire()
    head = b"POST /one HTTP/1.1\r\nx-thing: a\r\ntransfer-encoding: chunked\r\n\r\n"
    wire.send(head + b"2\r\nab\r\n0\r\nx-thing: b\r\nx-headrace-tenant: rich\r\n\r\n")
    request = wire.owner.requests[0]
    assert request.body == b"ab"
    assert request.headers == {"x-thing": "a", "transfer-encoding": "chunked"}


def test_pipelined_requests_wait_for_the_answer_before_them() -> None:
    wire = Wire()
    assert wire.send(b"GET /wait HTTP/1.1\r\n\r\nGET /next HTTP/1.1\r\n\r\n") == b""
    wire.owner.waiting[0].send(200, b"first")
    assert wire.transport.written.index(b"first") < wire.transport.written.index(b"/next")


def test_too_many_pipelined_requests_stop_the_reading_until_they_are_answered() -> None:
    wire = Wire(max_queued=3)
    wire.send(b"GET /wait HTTP/1.1\r\n\r\n" + b"GET /next HTTP/1.1\r\n\r\n" * 3)
    assert wire.transport.is_paused
    wire.owner.waiting[0].send(200, b"")
    assert not wire.transport.is_paused
    assert wire.transport.written.count(b"/next") == 3


def test_a_bad_request_behind_an_open_one_is_refused_after_its_answer() -> None:
    wire = Wire()
    assert wire.send(b"GET /wait HTTP/1.1\r\n\r\n" + BAD_END) == b""
    wire.owner.waiting[0].send(200, b"first")
    first, _, second = wire.transport.written.partition(b"first")
    assert (status(first), status(second)) == (200, 400)


def test_a_client_that_leaves_is_told_to_the_owner_of_the_answer_once() -> None:
    wire = Wire()
    wire.send(b"GET /wait HTTP/1.1\r\n\r\n")
    gone: list[bool] = []
    wire.owner.waiting[0].on_gone = lambda: gone.append(True)
    wire.connection.connection_lost(None)
    wire.owner.waiting[0].send(200, b"too late")
    assert gone == [True]
    assert wire.transport.written == b""
    assert wire.owner.num_left == 1


def test_a_stream_is_chunked_and_the_connection_stays() -> None:
    wire = Wire()
    wire.send(b"GET /wait HTTP/1.1\r\n\r\n")
    stream = wire.owner.waiting[0]
    stream.write(stream.start("x-a: b\r\n"), b"one")
    stream.end(b"", b"last")
    head, _, body = wire.transport.written.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert b"x-a: b" in head
    assert body == b"3\r\none\r\n4\r\nlast\r\n0\r\n\r\n"
    assert status(wire.send(b"GET /next HTTP/1.1\r\n\r\n")) == 200


def test_connection_close_is_honoured() -> None:
    wire = Wire()
    answer = wire.send(b"GET /x HTTP/1.1\r\nconnection: close\r\n\r\nGET /never HTTP/1.1\r\n\r\n")
    assert b"connection: close" in answer
    assert wire.transport.has_eof
    assert wire.send(b"GET /never HTTP/1.1\r\n\r\n") == b""


@pytest.mark.parametrize("num_bytes", [40_000, 200_000])
def test_a_head_without_end_is_refused_when_it_is_too_long(num_bytes: int) -> None:
    wire = Wire()
    answer = b""
    wire.send(b"GET /x HTTP/1.1\r\nx: ")
    for _ in range(num_bytes // 1000):
        answer += wire.send(b"y" * 1000)
    assert status(answer) == 413
    assert "32768" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_body_longer_than_the_limit_is_refused_before_it_is_read() -> None:
    wire = Wire(max_body_bytes=10)
    answer = wire.send(b"POST /x HTTP/1.1\r\ncontent-length: 11\r\n\r\n")
    assert status(answer) == 413
    assert wire.send(b"x" * 11) == b""
    assert not wire.owner.requests


def test_a_chunked_body_longer_than_the_limit_is_refused() -> None:
    wire = Wire(max_body_bytes=10)
    assert status(wire.send(chunked(b"/x", b"12345", b"67890", b"1"))) == 413
    assert not wire.owner.requests


def test_bodies_of_all_connections_together_are_bounded() -> None:
    wire = Wire(max_receiving_bytes=100)
    wire.send(b"POST /x HTTP/1.1\r\ncontent-length: 500\r\n\r\n" + b"x" * 60)
    assert wire.owner.num_receiving == 60
    answer = wire.send(b"x" * 60)
    assert status(answer) == 503
    wire.connection.connection_lost(None)
    assert wire.owner.num_receiving == 0


def test_a_body_that_was_handed_over_is_not_counted_any_more() -> None:
    wire = Wire()
    wire.send(post(b"/wait", b"x" * 60) + post(b"/next", b"x" * 30))
    assert wire.owner.num_receiving == 30
    wire.owner.waiting[0].send(200, b"")
    assert wire.owner.num_receiving == 0


def test_half_a_head_times_out_however_slowly_it_comes() -> None:
    wire = Wire(head_timeout_s=30)
    wire.send(b"GET /x HT")
    for piece in (b"TP", b"/1", b".1"):
        assert wire.pass_time(9.9) == b""
        wire.send(piece)
    assert status(wire.pass_time(0.5)) == 408
    assert wire.transport.has_eof


def test_half_a_body_times_out_when_nothing_comes() -> None:
    wire = Wire(body_idle_timeout_s=30, body_timeout_s=600)
    wire.send(b"POST /x HTTP/1.1\r\ncontent-length: 100\r\n\r\nhalf")
    assert wire.pass_time(29) == b""
    wire.send(b"more")
    assert wire.pass_time(29) == b""
    assert status(wire.pass_time(2)) == 408


def test_a_body_that_drips_times_out_in_the_end() -> None:
    wire = Wire(body_idle_timeout_s=30, body_timeout_s=100)
    wire.send(b"POST /x HTTP/1.1\r\ncontent-length: 100\r\n\r\n")
    for _ in range(5):
        wire.send(b"x")
        assert wire.pass_time(20) == b""
    assert status(wire.pass_time(1)) == 408


def test_an_idle_connection_is_closed_without_a_word() -> None:
    wire = Wire(keep_alive_s=300)
    wire.send(b"GET /x HTTP/1.1\r\n\r\n")
    assert wire.pass_time(299) == b""
    assert not wire.transport.is_closed
    assert wire.pass_time(2) == b""
    assert wire.transport.is_closed


def test_an_open_answer_has_no_idle_limit() -> None:
    wire = Wire()
    wire.send(b"GET /wait HTTP/1.1\r\n\r\n")
    wire.pass_time(10_000)
    assert not wire.transport.is_closing()


def test_a_client_that_reads_nothing_is_cut_off_after_the_stall_limit() -> None:
    wire = Wire(write_stall_s=30)
    wire.send(b"GET /wait HTTP/1.1\r\n\r\n")
    wire.transport.num_unread = 100_000
    wire.connection.pause_writing()
    wire.pass_time(29)
    wire.transport.num_unread = 90_000
    wire.pass_time(29)
    assert not wire.transport.is_aborted, "it reads, if slowly"
    wire.pass_time(31)
    assert wire.transport.is_aborted


def test_a_client_that_leaves_too_much_unread_is_cut_off_at_once() -> None:
    wire = Wire(max_write_buffer_bytes=1000)
    wire.send(b"GET /wait HTTP/1.1\r\n\r\n")
    stream = wire.owner.waiting[0]
    wire.connection.pause_writing()
    wire.transport.num_unread = 900
    stream.write(stream.start(), b"x")
    assert not wire.transport.is_aborted
    wire.transport.num_unread = 2000
    stream.write(b"", b"x")
    assert wire.transport.is_aborted


def test_a_refused_connection_is_read_no_longer_than_the_linger_time() -> None:
    wire = Wire(linger_s=2)
    wire.send(BAD_END)
    wire.pass_time(1)
    assert not wire.transport.is_aborted
    wire.pass_time(2)
    assert wire.transport.is_aborted


def test_a_connection_too_many_is_told_so() -> None:
    owner = Owner(HttpLimits())
    owner.has_room = False
    transport = MemoryTransport()
    HttpConnection(owner).connection_made(transport)
    assert status(transport.written) == 503
    assert b"retry-after: 1\r\n" in transport.written
    assert transport.has_eof


def test_100_continue_is_sent_when_it_is_asked_for_and_nothing_is_open() -> None:
    wire = Wire()
    assert wire.send(post(b"/x", b"", b"expect: 100-continue\r\n")).startswith(b"HTTP/1.1 200")
    head = b"POST /x HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
    assert wire.send(head) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert b"3 bytes" in wire.send(b"abc")


def test_requests_are_trusted_only_on_connections_that_are() -> None:
    wire = Wire()
    wire.send(b"GET /a HTTP/1.1\r\nx-headrace-tenant: rich\r\n\r\n")
    wire.connection = HttpConnection(wire.owner, is_trusted=True)
    wire.connection.connection_made(wire.transport)
    wire.send(b"GET /b HTTP/1.1\r\n\r\n")
    assert [request.is_trusted for request in wire.owner.requests] == [False, True]
