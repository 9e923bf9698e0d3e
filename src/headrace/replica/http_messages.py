"""HTTP messages as values: limits, a request, the heads of answers.

Owns bytes and numbers only. Must not know sockets, routes or models. Source: RFC 9110 and 9112.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from headrace.errors import InvalidRequest


class RequestTimeout(InvalidRequest):
    """The client did not send its whole request in time."""

    status = 408
    code = "request_timeout"


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a client may take."""

    max_body_bytes: int = 32 * 1024 * 1024
    max_head_bytes: int = 32 * 1024
    """Request line and all header fields together."""
    max_receiving_bytes: int = 512 * 1024 * 1024
    """Bodies being received, over all connections; at least max_body_bytes. Beyond it: 503."""
    max_connections: int = 4096
    max_queued: int = 8
    """Pipelined requests that wait behind the one being answered; then reading pauses."""
    head_timeout_s: float = 30.0
    """From the first byte of a request to the end of its head."""
    body_idle_timeout_s: float = 30.0
    """Longest silence inside a body."""
    body_timeout_s: float = 600.0
    """From the first byte of a request to its last."""
    keep_alive_s: float = 300.0
    """How long an idle connection stays open: longer than a proxy in front keeps it."""
    write_stall_s: float = 30.0
    """Longest time that a client with a full buffer may read nothing."""
    max_write_buffer_bytes: int = 1024 * 1024
    """Unread bytes of a stream; beyond it the client is cut off."""
    max_streams: int = 256
    """HTTP/2: streams open at once in one connection, and requests taken from it per turn of the loop."""
    max_control_frames: int = 10_000
    """HTTP/2: frames that carry nothing of a request, per `sweep_s`; beyond it the connection ends. A proxy
    whose clients leave sends one per request."""
    max_shared_stream_bytes: int = 240_000
    """HTTP/2: bytes of one streamed answer to a gateway, whose clients share the connection. What it takes
    without a client reading is 260,000 (ADR 14): beyond that it stops reading everybody's streams."""
    linger_s: float = 2.0
    """After a refusal that leaves bytes unread: how long they are read and dropped, so that the client sees
    the answer rather than a reset (RFC 9112, 9.6)."""
    sweep_s: float = 0.5
    """How often time limits are checked."""


@dataclass(slots=True)
class HttpRequest:
    """One whole request. Header names are lower case; of several equal names the last wins."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    arrived_s: float
    """When its last byte came, on the server's clock."""
    is_http_1_0: bool
    keep_alive: bool
    is_trusted: bool = False
    """It came over the UNIX socket, which only the owner of the system may open: from a gateway."""


class AnswerHeads:
    """Builds status lines and header fields. `fixed_headers` go with every answer."""

    def __init__(self, fixed_headers: str, wall_s: Callable[[], float]) -> None:
        self.fixed_headers = fixed_headers
        self._wall_s = wall_s
        self._date_second = -1
        self._date = ""

    def whole(self, status: int, num_bytes: int, content_type: str, headers: str, keep_alive: bool) -> bytes:
        """Return the head of an answer of `num_bytes`. `headers`: further `name: value\\r\\n` lines."""
        return (
            f"HTTP/1.1 {status} {_reason(status)}\r\ndate: {self.date()}\r\n"
            f"content-type: {content_type}\r\ncontent-length: {num_bytes}\r\n"
            f"{self.fixed_headers}{headers}{_connection(keep_alive)}\r\n"
        ).encode("latin-1")

    def stream(self, headers: str, keep_alive: bool, is_chunked: bool) -> bytes:
        """Return the head of a stream of server-sent events."""
        coding = "transfer-encoding: chunked\r\n" if is_chunked else ""
        return (
            f"HTTP/1.1 200 OK\r\ndate: {self.date()}\r\n"
            f"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n{coding}"
            f"{self.fixed_headers}{headers}{_connection(keep_alive and is_chunked)}\r\n"
        ).encode("latin-1")

    def date(self) -> str:
        """Return the value of the `date` field."""
        second = int(self._wall_s())
        if second != self._date_second:
            self._date_second, self._date = second, formatdate(second, usegmt=True)
        return self._date


def _connection(keep_alive: bool) -> str:
    return "" if keep_alive else "connection: close\r\n"


def _reason(status: int) -> str:
    return HTTPStatus(status).phrase
