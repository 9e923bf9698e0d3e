"""One HTTP/2 stream: a request that comes in, and its answer as far as the windows let it out.

Owns the stream's state, its bytes in both directions and their bounds. Must not know other streams, header
compression or routes. Source: RFC 9113, 5 and 8.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from headrace.replica.http2_frames import (
    DATA,
    DEFAULT_FRAME_BYTES,
    END_STREAM,
    FRAME_HEADER,
    MAX_WINDOW_BYTES,
    ErrorCode,
    StreamError,
    pack_window_update,
)
from headrace.replica.http2_heads import RequestHead
from headrace.replica.http2_hpack import encode_status
from headrace.replica.http_responder import Responder

if TYPE_CHECKING:
    from headrace.replica.http2_connection import Http2Connection

RECEIVE_WINDOW_BYTES = 1 << 20
"""What a client may send of one body before we took it: a body of any size needs few waits."""
_MAX_FRAMES_AT_ONCE = 8
"""A long answer goes on when these were written, so that other streams get their turns."""
_PACK = FRAME_HEADER.pack


class Http2Stream(Responder):
    """A request and its answer. `head` is None once it was refused before it was whole."""

    __slots__ = (
        "_connection",
        "_is_ended",
        "_num_unacknowledged",
        "body",
        "first_s",
        "head",
        "is_received",
        "last_s",
        "max_bytes",
        "num_body_bytes",
        "num_queued_bytes",
        "num_reserved",
        "num_sent",
        "progress_s",
        "queue",
        "receive_window",
        "stream_id",
        "window",
    )

    def __init__(self, connection: Http2Connection, stream_id: int, window: int, now_s: float) -> None:
        super().__init__()
        self._connection = connection
        self.stream_id = stream_id
        self.head: RequestHead | None = None
        self.is_received = False
        """The client sent its end."""
        self.body: list[bytes] = []
        self.num_body_bytes = 0
        self.num_reserved = 0
        """Body bytes that the server counts for this stream: received and not yet handed over."""
        self.receive_window = RECEIVE_WINDOW_BYTES
        self._num_unacknowledged = 0
        self.first_s = self.last_s = now_s
        """When its first and its newest frame came."""
        self.window = window
        """Bytes that the client takes. Negative after it made all its windows smaller."""
        self.queue: deque[bytes | memoryview] = deque()
        """Parts of the answer that wait for a window or for the socket."""
        self.num_queued_bytes = 0
        self.num_sent = 0
        self.max_bytes = 0
        """Bound of what is sent as a stream; 0: the windows are the only one."""
        self._is_ended = False
        """The last byte of the answer was sent or is queued."""
        self.progress_s = now_s
        """When bytes were sent last, while some wait."""

    def __repr__(self) -> str:
        return (
            f"Http2Stream({self.stream_id}, {self.num_body_bytes} in, {self.num_sent} out, "
            f"{self.num_queued_bytes} queued)"
        )

    # ---- the request comes in

    def receive(self, data: bytes, num_bytes: int, now_s: float) -> bytes:
        """Take a part of the body, of a frame with `num_bytes`, padding included; return what to answer.

        Raises StreamError if it is more than was announced or than our window allows.
        """
        self.last_s = now_s
        self.receive_window -= num_bytes
        if self.receive_window < 0:
            raise StreamError(ErrorCode.FLOW_CONTROL_ERROR, "more bytes than the stream's window allows")
        self.num_body_bytes += len(data)
        announced = None if self.head is None else self.head.content_length
        if announced is not None and self.num_body_bytes > announced:
            raise StreamError(ErrorCode.PROTOCOL_ERROR, "the body is longer than its content-length")
        self._num_unacknowledged += num_bytes
        if self._num_unacknowledged < RECEIVE_WINDOW_BYTES // 2:
            return b""
        update = pack_window_update(self.stream_id, self._num_unacknowledged)
        self.receive_window += self._num_unacknowledged
        self._num_unacknowledged = 0
        return update

    def take_body(self) -> bytes:
        """Return the whole body. Raises StreamError if less came than was announced."""
        head = self.head
        if head is not None and head.content_length not in (None, self.num_body_bytes):
            raise StreamError(ErrorCode.PROTOCOL_ERROR, "the body is shorter than its content-length")
        body = b"".join(self.body)
        self.body.clear()
        return body

    # ---- the answer

    def send(
        self, status: int, body: bytes, headers: str = "", content_type: str = "application/json"
    ) -> None:
        if self.is_done:
            return
        connection = self._connection
        block = connection.blocks.whole(status, len(body), content_type, headers)
        if not body or (self.head is not None and self.head.method == "HEAD"):
            connection.push_headers(self.stream_id, block, is_end=True)
            self._is_ended = True
        else:
            connection.push_headers(self.stream_id, block, is_end=False)
            self._send_data(body, is_end=True)
        if not self.is_done:
            self._finish()

    def start(self, headers: str = "") -> bytes:
        return self._connection.blocks.stream(headers)

    def write(self, head: bytes, frames: bytes) -> None:
        if self.is_done:
            return
        connection = self._connection
        if head:
            connection.push_headers(self.stream_id, head, is_end=False)
        size = len(frames)
        if (
            self.queue
            or size > self.window
            or size > DEFAULT_FRAME_BYTES
            or size > connection.window
            or connection.is_holding
        ):
            self._send_data(frames, is_end=False)
        else:
            self.window -= size
            connection.window -= size
            connection.push(_PACK(size << 8, 0, self.stream_id) + frames)
            self.num_sent += size
            if self.max_bytes and self.num_sent > self.max_bytes:
                connection.reset(self, ErrorCode.CANCEL)

    def end(self, head: bytes, frames: bytes) -> None:
        if self.is_done:
            return
        if head:
            self._connection.push_headers(self.stream_id, head, is_end=False)
        self._send_data(frames, is_end=True)
        if not self.is_done:
            self._finish()

    def close_after(self) -> None:
        self._connection.close_if_idle()

    def _finish(self) -> None:
        self.is_done = True
        self.on_gone = None
        if not self.queue:
            self._connection.sent(self)

    def send_continue(self) -> None:
        """Tell the client that its body is wanted."""
        self._connection.push_headers(self.stream_id, encode_status(100), is_end=False)

    # ---- what the windows let out

    def grant(self, num_bytes: int) -> None:
        """Take more bytes to send. Raises StreamError if that is more than a window may be."""
        self.window += num_bytes
        if self.window > MAX_WINDOW_BYTES:
            raise StreamError(ErrorCode.FLOW_CONTROL_ERROR, "the stream's window became too large")

    def _send_data(self, data: bytes, *, is_end: bool) -> None:
        """Send what may be sent, in frames of a size that every peer takes, and queue the rest."""
        connection = self._connection
        # A single whole answer may be longer than the limit: the stall limit holds for it.
        is_too_much = self.num_queued_bytes > connection.max_queued_bytes
        self.num_queued_bytes += len(data)
        if is_too_much or (self.max_bytes and self.num_sent + self.num_queued_bytes > self.max_bytes):
            connection.reset(self, ErrorCode.CANCEL)
            return
        self._is_ended = is_end
        self.queue.append(memoryview(data) if len(data) > DEFAULT_FRAME_BYTES else data)
        for _ in range(_MAX_FRAMES_AT_ONCE):
            if not self.send_some():
                break
        if self.queue:
            connection.queue(self)

    def send_some(self) -> bool:
        """Send one frame of what is queued. False: nothing is queued, or it must wait."""
        queue, connection = self.queue, self._connection
        if not queue or connection.is_holding:
            return False
        data = queue[0]
        room = min(self.window, connection.window, DEFAULT_FRAME_BYTES)
        if data and room < len(data):
            if room <= 0:
                return False
            queue[0], data = data[room:], data[:room]
        else:
            queue.popleft()
        size = len(data)
        flags = END_STREAM if self._is_ended and not queue else 0
        self.window -= size
        connection.window -= size
        self.num_queued_bytes -= size
        self.num_sent += size
        connection.push(_PACK(size << 8 | DATA, flags, self.stream_id) + data)
        return True

    def drop(self) -> None:
        """Forget what was not sent: the stream ended early."""
        self.queue.clear()
        self.num_queued_bytes = 0
        self.body.clear()
