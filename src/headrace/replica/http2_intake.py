"""The requests of one HTTP/2 connection while they come in: header blocks, bodies, refusals.

Owns header decompression, which requests are whole, and the bounds of what a client may send. Must not know
sockets, or how answers leave. Source: RFC 9113, 8.
"""

from __future__ import annotations

from typing import Protocol

import httptools

from headrace.errors import InvalidRequest, Overloaded, PayloadTooLarge, RequestError
from headrace.replica import http2_frames as h2
from headrace.replica.http2_frames import ErrorCode, Http2Error, StreamError
from headrace.replica.http2_heads import RequestHead, check_fields, read_head
from headrace.replica.http2_hpack import Field, HpackDecoder
from headrace.replica.http2_stream import Http2Stream
from headrace.replica.http_connection import ConnectionOwner
from headrace.replica.http_messages import HttpRequest, RequestTimeout

CONNECTION_WINDOW_BYTES = 1 << 24
"""What a client may send of all bodies before we took it."""
_MAX_CONTINUATIONS = 64
_MAX_RESET_REMEMBERED = 1024


class StreamTable(Protocol):
    """The connection, as the intake sees it."""

    streams: dict[int, Http2Stream]
    is_leaving: bool

    def open(self, stream_id: int) -> Http2Stream: ...

    def push(self, frame: bytes) -> None:
        """Send a frame."""
        ...

    def count_control_frame(self) -> None:
        """Count a frame that carries nothing of a request. Raises Http2Error if there are too many."""
        ...

    def reset(self, stream: Http2Stream, code: ErrorCode) -> None:
        """End a stream early."""
        ...

    def hand_over(self, stream: Http2Stream, request: HttpRequest) -> None:
        """The request is whole: have it answered."""
        ...


class _HeaderBlock:
    """A header block whose frames are still coming."""

    __slots__ = ("began_s", "is_last", "num_bytes", "parts", "stream_id")

    def __init__(self, stream_id: int, is_last: bool, first: bytes, now_s: float) -> None:
        self.stream_id = stream_id
        self.is_last = is_last
        """Its stream ends with it."""
        self.parts = [first]
        self.num_bytes = len(first)
        self.began_s = now_s


class RequestIntake:
    """Turns HEADERS, CONTINUATION and DATA of one connection into requests."""

    def __init__(self, table: StreamTable, owner: ConnectionOwner, is_trusted: bool) -> None:
        self._table = table
        self._is_trusted = is_trusted
        self._owner = owner
        self._limits = owner.limits
        self._decoder = HpackDecoder(owner.limits.max_head_bytes)
        self._block: _HeaderBlock | None = None
        self._window = CONNECTION_WINDOW_BYTES
        self._reset_ids: dict[int, None] = {}
        """Streams that we ended early: frames of theirs that were on their way are no error."""
        self.last_stream_id = 0
        self.num_taken = 0
        """Streams opened in this turn of the event loop."""

    def __repr__(self) -> str:
        return f"RequestIntake({self.last_stream_id} is the last stream, {self._decoder!r})"

    @property
    def block_stream_id(self) -> int:
        """The stream whose header block is being received, which nothing may interrupt; 0: none."""
        return 0 if self._block is None else self._block.stream_id

    def check_not_idle(self, stream_id: int) -> None:
        """Raise Http2Error for a stream that was never opened."""
        if not stream_id or stream_id > self.last_stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"a frame of stream {stream_id}, which is not open")

    def remember_reset(self, stream_id: int) -> None:
        """Frames of this stream that still come are to be ignored."""
        self._reset_ids[stream_id] = None
        if len(self._reset_ids) > _MAX_RESET_REMEMBERED:
            del self._reset_ids[next(iter(self._reset_ids))]

    # ---- heads

    def on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Take HEADERS. Raises Http2Error."""
        fragment = h2.strip_priority(flags, h2.strip_padding(flags, payload))
        if not stream_id & 1:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {stream_id}")
        is_last = bool(flags & h2.END_STREAM)
        self._block = _HeaderBlock(stream_id, is_last, fragment, self._owner.clock.now_s())
        if flags & h2.END_HEADERS:
            self._on_block()

    def on_continuation(self, flags: int, payload: bytes) -> None:
        """Take CONTINUATION. Raises Http2Error."""
        block = self._block
        if block is None:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of no header block")
        block.parts.append(payload)
        block.num_bytes += len(payload)
        # Well above max_head_bytes: up to here the request gets an answer.
        if block.num_bytes > 4 * self._limits.max_head_bytes or len(block.parts) > _MAX_CONTINUATIONS:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "a header block is too long")
        if flags & h2.END_HEADERS:
            self._on_block()

    def _on_block(self) -> None:
        block, self._block = self._block, None
        assert block is not None
        # Also a block that will be ignored: the table goes on with it.
        fields = self._decoder.decode(b"".join(block.parts))
        stream = self._table.streams.get(block.stream_id)
        if stream is not None:
            self._on_trailers(stream, block, fields)
        elif block.stream_id > self.last_stream_id:
            self._open(block, fields)
        elif block.stream_id not in self._reset_ids:
            raise Http2Error(ErrorCode.STREAM_CLOSED, f"HEADERS of the closed stream {block.stream_id}")

    def _on_trailers(self, stream: Http2Stream, block: _HeaderBlock, fields: list[Field] | None) -> None:
        try:
            if not block.is_last or stream.is_received:
                raise StreamError(ErrorCode.PROTOCOL_ERROR, "HEADERS inside a request")
            if any(name[:1] == ":" for name, _ in fields or ()):
                raise StreamError(ErrorCode.PROTOCOL_ERROR, "trailers with pseudo fields")
            check_fields(fields or ())
            self._complete(stream)
        except StreamError as error:
            self._table.reset(stream, error.code)

    def _open(self, block: _HeaderBlock, fields: list[Field] | None) -> None:
        stream_id = self.last_stream_id = block.stream_id
        table, limits = self._table, self._limits
        self.num_taken += 1
        # Streams that were opened and reset again count as well: one turn of the loop takes so many requests.
        if table.is_leaving or max(len(table.streams) + 1, self.num_taken) > limits.max_streams:
            table.count_control_frame()
            self.remember_reset(stream_id)
            table.push(h2.pack_reset(stream_id, ErrorCode.REFUSED_STREAM))
            return
        stream = table.open(stream_id)
        stream.is_received = block.is_last
        if fields is None:
            limit = limits.max_head_bytes
            message = f"the request's head is longer than {limit} bytes; send fewer headers"
            self._refuse(stream, PayloadTooLarge(message))
            return
        try:
            stream.head = head = read_head(fields)
            if "x-headrace-request-id" in head.headers:
                stream.max_bytes = limits.max_shared_stream_bytes
            self._take_head(stream, head)
        except StreamError as error:
            table.reset(stream, error.code)

    def _take_head(self, stream: Http2Stream, head: RequestHead) -> None:
        if head.method == "CONNECT":
            self._refuse(stream, InvalidRequest("connections are not upgraded; send no CONNECT"))
        elif (head.content_length or 0) > self._limits.max_body_bytes:
            self._refuse_body(stream, str(head.content_length))
        elif stream.is_received:
            self._complete(stream)
        elif head.headers.get("expect", "").lower() == "100-continue":
            stream.send_continue()

    # ---- bodies

    def on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Take DATA. Raises Http2Error."""
        data, num_bytes = h2.strip_padding(flags, payload), len(payload)
        self._window -= num_bytes
        if self._window < 0:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "more bytes than the connection's window allows")
        if self._window < CONNECTION_WINDOW_BYTES // 2:
            self._table.push(h2.pack_window_update(0, CONNECTION_WINDOW_BYTES - self._window))
            self._window = CONNECTION_WINDOW_BYTES
        is_last = bool(flags & h2.END_STREAM)
        if not data and not is_last:
            self._table.count_control_frame()
        stream = self._table.streams.get(stream_id)
        if stream is None:
            self.check_not_idle(stream_id)
            return  # it was answered before its body came, or reset
        try:
            if stream.is_received:
                raise StreamError(ErrorCode.STREAM_CLOSED, "DATA behind the end of the request")
            self._take_data(stream, data, num_bytes, is_last)
        except StreamError as error:
            self._table.reset(stream, error.code)

    def _take_data(self, stream: Http2Stream, data: bytes, num_bytes: int, is_last: bool) -> None:
        update = stream.receive(data, num_bytes, self._owner.clock.now_s())
        if stream.is_done:
            pass  # it is answered already; what still comes of it is dropped
        elif stream.num_body_bytes > self._limits.max_body_bytes:
            self._refuse_body(stream, "more")
            return
        elif not self._owner.reserve(len(data)):
            message = "too many large requests at once; try again later"
            self._refuse(stream, Overloaded(message, retry_after_s=1.0))
            return
        else:
            stream.num_reserved += len(data)
            stream.body.append(data)
        if is_last:
            stream.is_received = True
            self._complete(stream)
        elif update:
            self._table.push(update)

    def _complete(self, stream: Http2Stream) -> None:
        """The request is whole. Raises StreamError if it is not what was announced."""
        stream.is_received = True
        body, head = stream.take_body(), stream.head
        self.release(stream)
        if stream.is_done or head is None:
            return
        try:
            path = httptools.parse_url(head.target.encode("latin-1")).path or b"/"
        except httptools.HttpParserInvalidURLError:
            message = "the request target is not a path; send for example GET /v1/models"
            self._refuse(stream, InvalidRequest(message))
            return
        request = HttpRequest(
            head.method,
            path.decode("latin-1"),
            head.headers,
            body,
            self._owner.clock.now_s(),
            is_http_1_0=False,
            keep_alive=True,
            is_trusted=self._is_trusted,
        )
        self._table.hand_over(stream, request)

    def release(self, stream: Http2Stream) -> None:
        """The stream's body bytes are not being received any more."""
        self._owner.reserve(-stream.num_reserved)
        stream.num_reserved = 0

    def _refuse_body(self, stream: Http2Stream, got: str) -> None:
        limit = self._limits.max_body_bytes
        self._refuse(stream, PayloadTooLarge(f"the body has {got} bytes; at most {limit} are allowed"))

    def _refuse(self, stream: Http2Stream, error: RequestError) -> None:
        """Answer before the request is whole; the rest of it is not wanted."""
        stream.body.clear()
        self.release(stream)
        stream.send_error(error)

    # ---- time

    def check_time_limits(self, now_s: float) -> None:
        """Refuse requests that do not come in. Raises Http2Error if a header block does not."""
        limits = self._limits
        if self._block is not None and now_s - self._block.began_s > limits.head_timeout_s:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a header block did not come in time")
        for stream in list(self._table.streams.values()):
            if stream.is_received or stream.is_done:
                continue
            is_idle = now_s - stream.last_s > limits.body_idle_timeout_s
            if is_idle or now_s - stream.first_s > limits.body_timeout_s:
                message = "the request's body did not come in time; send it without pauses"
                self._refuse(stream, RequestTimeout(message))
