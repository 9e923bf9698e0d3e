"""One HTTP/1.1 client connection on asyncio.Protocol and httptools.

Owns a socket towards a client, what was received of its next requests, and the order of answers. A client
that leaves is told to the owner of the open answer at once. Must not know routes or models. Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, cast

import httptools
import msgspec

from headrace.api.openai import describe_error
from headrace.clock import Clock
from headrace.errors import InvalidRequest, Overloaded, PayloadTooLarge, RequestError
from headrace.replica.http_messages import AnswerHeads, HttpLimits, HttpRequest, RequestTimeout
from headrace.replica.http_responder import Responder, retry_header
from headrace.replica.write_stall import WriteStall


class Http1Responder(Responder):
    """Answers one request of an `HttpConnection`: streams in chunks, to HTTP/1.0 clients until the close."""

    __slots__ = ("_connection", "_is_chunked", "_request")

    def __init__(self, connection: HttpConnection, request: HttpRequest) -> None:
        super().__init__()
        self._connection = connection
        self._request = request
        self._is_chunked = not request.is_http_1_0

    def send(
        self, status: int, body: bytes, headers: str = "", content_type: str = "application/json"
    ) -> None:
        if self.is_done:
            return
        keep_alive = self._request.keep_alive
        head = self._connection.heads.whole(status, len(body), content_type, headers, keep_alive)
        self._connection.write(head if self._request.method == "HEAD" else head + body)
        self._finish(keep_alive)

    def start(self, headers: str = "") -> bytes:
        return self._connection.heads.stream(headers, self._request.keep_alive, self._is_chunked)

    def write(self, head: bytes, frames: bytes) -> None:
        if self._is_chunked:
            self._connection.write(b"%b%x\r\n%b\r\n" % (head, len(frames), frames))
        else:
            self._connection.write(head + frames)

    def end(self, head: bytes, frames: bytes) -> None:
        if self.is_done:
            return
        if self._is_chunked:
            self._connection.write(b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(frames), frames))
        else:
            self._connection.write(head + frames)
        self._finish(self._request.keep_alive and self._is_chunked)

    def close_after(self) -> None:
        self._request.keep_alive = False

    def _finish(self, keep_alive: bool) -> None:
        self.is_done = True
        self.on_gone = None
        self._connection.answered(keep_alive)


class Connection(Protocol):
    """A client's connection, as the server sees it."""

    def close_if_idle(self) -> None:
        """Close now unless something is being received or answered; then close after the answer."""
        ...

    def abort(self) -> None:
        """Drop the connection and what is unsent."""
        ...

    def check_time_limits(self, now_s: float) -> None:
        """Apply the time limits. Called every `sweep_s`."""
        ...


class ConnectionOwner(Protocol):
    """The server, as its connections see it."""

    limits: HttpLimits
    heads: AnswerHeads
    clock: Clock

    def joined(self, connection: Connection) -> bool:
        """Take the connection; false: there is no room for it."""
        ...

    def left(self, connection: Connection) -> None: ...

    def reserve(self, num_bytes: int) -> bool:
        """Count body bytes as being received (negative: no longer); false: there is no room for them."""
        ...

    def handle(self, request: HttpRequest, responder: Responder) -> None: ...


class HttpConnection(asyncio.Protocol):
    """Requests of one client, answered one after the other in their order."""

    def __init__(self, owner: ConnectionOwner, is_trusted: bool = False) -> None:
        self._owner = owner
        self._is_trusted = is_trusted
        self._limits = owner.limits
        self.heads = owner.heads
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._queue: deque[HttpRequest | RequestError] = deque()
        self._active: Http1Responder | None = None
        self._is_advancing = False
        self._is_discarding = False
        """Bytes that still come are dropped: the connection ends with the last queued answer."""
        self._lingers_since_s: float | None = None
        self._num_reserved = 0
        """Body bytes that the owner counts for this connection: received and not yet handed over."""
        self._is_reading_paused = False
        self._is_writing_paused = False
        self._stall = WriteStall()
        self._since_s = self._last_data_s = owner.clock.now_s()
        """When the message being received began, or when the connection became idle; and its last byte."""
        self._begin_message()
        self._is_in_message = False

    # ---- the message being received; called by httptools

    def _begin_message(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._head_bytes = 0
        self._unfinished_head_bytes = 0
        self._body_bytes = 0
        self._is_in_head = True
        self._wants_continue = False

    def on_message_begin(self) -> None:
        self._begin_message()
        self._is_in_message = True
        self._since_s = self._last_data_s

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return  # a trailer: a client's, since proxies pass them on, so it must not speak of identity
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self._head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._is_discarding:
            return
        if self._head_bytes + len(self._url) > self._limits.max_head_bytes:
            self._refuse_head()
        elif self._parser.should_upgrade():
            self._refuse(
                InvalidRequest("connections are not upgraded; send no Upgrade header and no CONNECT")
            )
        elif int(self._headers.get("content-length") or 0) > self._limits.max_body_bytes:
            self._refuse_body(self._headers["content-length"])
        elif self._headers.get("expect", "").lower() == "100-continue":
            self._wants_continue = True

    def on_body(self, data: bytes) -> None:
        if self._is_discarding:
            return
        self._body_bytes += len(data)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_body("more")
        elif not self._owner.reserve(len(data)):
            self._refuse(Overloaded("too many large requests at once; try again later", retry_after_s=1.0))
        else:
            self._num_reserved += len(data)
            self._body.append(data)

    def on_message_complete(self) -> None:
        if self._is_discarding:
            return
        self._is_in_message = False
        self._wants_continue = False
        try:
            path = httptools.parse_url(self._url).path or b"/"
        except httptools.HttpParserInvalidURLError:
            self._refuse(InvalidRequest("the request target is not a path; send for example GET /v1/models"))
            return
        request = HttpRequest(
            self._parser.get_method().decode("latin-1"),
            path.decode("latin-1"),
            self._headers,
            b"".join(self._body),
            self._last_data_s,
            self._parser.get_http_version() == "1.0",
            self._parser.should_keep_alive(),
            self._is_trusted,
        )
        self._queue.append(request)
        self._begin_message()

    def _refuse_head(self) -> None:
        limit = self._limits.max_head_bytes
        self._refuse(PayloadTooLarge(f"the request's head is longer than {limit} bytes; send fewer headers"))

    def _refuse_body(self, got: str) -> None:
        limit = self._limits.max_body_bytes
        self._refuse(PayloadTooLarge(f"the body has {got} bytes; at most {limit} are allowed"))

    def _refuse(self, error: RequestError) -> None:
        """End the connection with `error`, after the answers that are due before it."""
        self._queue.append(error)
        self._is_discarding = True
        self._is_in_message = False
        self._body.clear()

    # ---- the transport's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._owner.joined(self):
            self._refuse(Overloaded("too many connections; try again later", retry_after_s=1.0))
            self._advance()

    def data_received(self, data: bytes) -> None:
        if self._is_discarding:
            return
        self._last_data_s = self._owner.clock.now_s()
        was_in_earlier_part = self._is_in_message and not self._is_in_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # on_headers_complete refused it
        except httptools.HttpParserError as error:
            if not self._is_discarding:
                self._refuse(InvalidRequest(f"not valid HTTP: {error}", code="bad_http"))
        # httptools keeps an unfinished field to itself, so an unfinished head is counted as it comes in.
        if self._is_in_message and self._is_in_head and not was_in_earlier_part:
            self._unfinished_head_bytes += len(data)
            if self._unfinished_head_bytes > self._limits.max_head_bytes:
                self._refuse_head()
        self._advance()

    def eof_received(self) -> None:
        """The client closed its side: as with other servers, that means it left. The transport closes."""

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._is_discarding = True
        self._queue.clear()
        self._release(self._num_reserved)
        self._owner.left(self)
        active, self._active = self._active, None
        if active is not None:
            active.gone()

    def pause_writing(self) -> None:
        assert self._transport is not None
        self._is_writing_paused = True
        self._stall.begin(self._transport.get_write_buffer_size(), self._owner.clock.now_s())

    def resume_writing(self) -> None:
        self._is_writing_paused = False

    # ---- answers

    def _advance(self) -> None:
        """Answer what is queued, until one answer takes its time."""
        if self._is_advancing:
            return
        self._is_advancing = True
        while self._active is None and self._queue and self._transport is not None:
            entry = self._queue.popleft()
            if isinstance(entry, RequestError):
                self._end_with(entry)
                break
            self._active = responder = Http1Responder(self, entry)
            self._release(len(entry.body))
            self._owner.handle(entry, responder)
        self._is_advancing = False
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        should_pause = len(self._queue) >= self._limits.max_queued and not self._is_discarding
        if should_pause != self._is_reading_paused:
            self._is_reading_paused = should_pause
            transport.pause_reading() if should_pause else transport.resume_reading()
        if self._wants_continue and self._active is None and not self._is_discarding:
            self._wants_continue = False
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _release(self, num_bytes: int) -> None:
        self._num_reserved -= num_bytes
        self._owner.reserve(-num_bytes)

    def _end_with(self, error: RequestError) -> None:
        body = msgspec.json.encode(describe_error(error))
        self.write(
            self.heads.whole(error.status, len(body), "application/json", retry_header(error), False) + body
        )
        self._linger()

    def answered(self, keep_alive: bool) -> None:
        """The active answer is complete; take the next request, or close."""
        self._active = None
        if self._transport is None:
            return
        self._since_s = self._last_data_s = self._owner.clock.now_s()
        if keep_alive:
            self._advance()
        else:
            self._queue.clear()
            self._linger()

    def write(self, data: bytes) -> None:
        """Send bytes; cut the client off if it leaves too many unread."""
        transport = self._transport
        if transport is None:
            return
        transport.write(data)
        # A single whole answer may be longer than the limit: the stall limit holds for it.
        if self._is_writing_paused and len(data) < transport.get_write_buffer_size() - (
            self._limits.max_write_buffer_bytes
        ):
            transport.abort()

    def _linger(self) -> None:
        assert self._transport is not None
        self._is_discarding = True
        self._lingers_since_s = self._owner.clock.now_s()
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def close_if_idle(self) -> None:
        """Close now unless something is being received or answered; then close after the answer."""
        if self._transport is not None and self._active is None and not self._is_in_message:
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection and what is unsent."""
        if self._transport is not None:
            self._transport.abort()

    def check_time_limits(self, now_s: float) -> None:
        """Apply the time limits. Called every `sweep_s`."""
        transport = self._transport
        if transport is None:
            return
        if self._is_writing_paused:
            if self._stall.is_over(transport.get_write_buffer_size(), now_s, self._limits.write_stall_s):
                transport.abort()
        elif self._lingers_since_s is not None:
            if now_s - self._lingers_since_s > self._limits.linger_s:
                transport.abort()
        elif self._active is not None or self._queue:
            return
        elif self._is_in_message:
            self._check_receiving(now_s)
        elif now_s - self._since_s > self._limits.keep_alive_s:
            transport.close()

    def _check_receiving(self, now_s: float) -> None:
        limits = self._limits
        if self._is_in_head:
            is_late, what = now_s - self._since_s > limits.head_timeout_s, "head"
        else:
            is_idle = now_s - self._last_data_s > limits.body_idle_timeout_s
            is_late, what = is_idle or now_s - self._since_s > limits.body_timeout_s, "body"
        if is_late:
            self._refuse(RequestTimeout(f"the request's {what} did not come in time; send it without pauses"))
            self._advance()
