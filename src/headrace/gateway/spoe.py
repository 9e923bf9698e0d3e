"""The SPOE agent: HAProxy's connections, one Protocol object each, over `headrace.gateway.spop`.

Owns connections, frames in flight and their bounds. An answer may come at once or much later (the request is
held); answers go back in any order. Must not know endpoints or replicas: `on_notify` decides.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import cast

from headrace.errors import ProtocolError
from headrace.gateway import spop

MAX_FRAMES_IN_FLIGHT = 65_536
"""Unanswered frames per connection: as many requests as may be held at all (max-waiting-frames)."""
MAX_ANSWERS_PER_WRITE = 8
"""Answers to frames that came together leave together, up to this many: a write costs as much as a fifth of a
decision, and the first answer waits for the last one's decision. The last one leaves at once, before what
follows from its decision is noted."""
MIN_FRAME_BYTES = 11
"""Length, kind, flags and two ids."""
MAX_UNSENT_BYTES = 4 * 1024 * 1024
"""A HAProxy that stops reading its answers is disconnected at this many."""

Arguments = Mapping[bytes, spop.SpopValue]
NotifyHandler = Callable[["SpoeCall", bytes, Arguments], None]


class SpoeCall:
    """One NOTIFY frame that waits for its answer. Answer it once; once the connection ended, in vain."""

    __slots__ = ("_frame_key", "connection")

    def __init__(self, connection: SpoeConnection, frame_key: tuple[int, int]) -> None:
        self.connection = connection
        self._frame_key = frame_key

    def answer(self, actions: bytes) -> None:
        """Do this for the request (`spop.encode_actions`), and let it go on."""
        self.connection.send_ack(self._frame_key, actions)


class SpoeConnection(asyncio.Protocol):
    """One connection from one HAProxy process."""

    def __init__(
        self,
        on_notify: NotifyHandler,
        on_lost: Callable[[SpoeConnection], None],
        on_error: Callable[[str], None],
    ) -> None:
        self._on_notify = on_notify
        self._on_lost = on_lost
        self._on_error = on_error
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._has_greeted = False
        self._descriptor = -1
        self._has_more = False
        """Whether another frame is there to be handled: its answer may leave together with this one's."""
        self._answers: list[bytes] = []  # given while frames are handled, and not written yet
        self._open_frames: set[tuple[int, int]] = set()

    def __repr__(self) -> str:
        state = "closed" if self._transport is None else "open"
        return f"<SpoeConnection {state} unanswered={len(self._open_frames)}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, of the same shape
        socket = transport.get_extra_info("socket")
        self._descriptor = socket.fileno() if socket is not None else -1

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._descriptor = -1  # soon another file's
        self._rest = b""
        self._answers.clear()
        self._open_frames.clear()
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        start, size = 0, len(data)
        try:
            while size - start >= 4 and self._transport is not None:
                length = int.from_bytes(data[start : start + 4], "big")
                if length > spop.MAX_FRAME_BYTES:
                    raise ProtocolError(
                        f"a SPOP frame announces {length} bytes; at most {spop.MAX_FRAME_BYTES} are allowed"
                    )
                end = start + 4 + length
                if end > size:
                    break
                frame = data[start + 4 : end]
                start = end
                self._has_more = size - start >= MIN_FRAME_BYTES
                decoded = spop.decode_frame(frame)
                if decoded.kind == spop.NOTIFY:
                    self._handle_notify(decoded)
                else:
                    self._handle(decoded)
        except ProtocolError as error:
            start = size  # nothing after a lie is believed
            self._on_error(str(error))
            self._close(spop.encode_disconnect(4, b"invalid frame"))
        finally:
            self._has_more = False
            self._write_answers()
        self._rest = data[start:]  # at most one frame

    def send_ack(self, frame_key: tuple[int, int], actions: bytes) -> None:
        """Answer one frame; nothing happens if it was answered or the connection is gone."""
        if self._transport is None or frame_key not in self._open_frames:
            return
        self._open_frames.remove(frame_key)
        self._answers.append(spop.encode_ack(*frame_key, actions))
        if not self._has_more or len(self._answers) >= MAX_ANSWERS_PER_WRITE:
            self._write_answers()

    def _write_answers(self) -> None:
        transport = self._transport
        if transport is None or not self._answers:
            return
        data = b"".join(self._answers)
        self._answers.clear()
        if transport.get_write_buffer_size() == 0:
            data = data[self._write_now(data) :]
            if not data:
                return
        transport.write(data)
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._on_error("HAProxy does not read its answers; disconnected")
            transport.abort()

    def _write_now(self, data: bytes) -> int:
        """Write past the event loop, which would write at the end of its turn; return how much was taken.
        What goes wrong is left to the transport, which meets the same error."""
        if self._descriptor < 0:
            return 0
        try:
            return os.write(self._descriptor, data)
        except OSError:  # the socket's buffer is full, or the connection is gone
            return 0

    def close(self) -> None:
        """Say goodbye and close."""
        self._close(spop.encode_disconnect(0, b"shutting down"))

    def _handle(self, frame: spop.Frame) -> None:
        if frame.kind == spop.HAPROXY_HELLO:
            hello = spop.decode_hello(frame.payload)
            self._has_greeted = True
            self._write(spop.encode_hello(hello.max_frame_bytes))
            if hello.is_healthcheck:
                self._close(b"")
        elif frame.kind == spop.HAPROXY_DISCONNECT:
            self._close(spop.encode_disconnect(0, b"normal"))
        else:
            raise ProtocolError(f"SPOP frame kind {frame.kind} is not known")

    def _handle_notify(self, frame: spop.Frame) -> None:
        if not self._has_greeted:
            raise ProtocolError("a NOTIFY frame came before HELLO")
        key = (frame.stream_id, frame.frame_id)
        if key in self._open_frames:
            raise ProtocolError(f"SPOP frame {key} was sent twice")
        if len(self._open_frames) >= MAX_FRAMES_IN_FLIGHT:
            raise ProtocolError(f"more than {MAX_FRAMES_IN_FLIGHT} SPOP frames wait for an answer")
        messages = spop.decode_messages(frame.payload)
        if len(messages) != 1:
            raise ProtocolError(f"a SPOP frame carries {len(messages)} messages; one is expected")
        self._open_frames.add(key)
        name, arguments = messages[0]
        self._on_notify(SpoeCall(self, key), name, arguments)

    def _write(self, data: bytes) -> None:
        self._write_answers()
        if self._transport is not None:
            self._transport.write(data)

    def _close(self, last_words: bytes) -> None:
        self._write_answers()
        if self._transport is None:
            return
        if last_words:
            self._transport.write(last_words)
        self._transport.close()


class SpoeAgent:
    """Listens on a UNIX socket for HAProxy's SPOE connections."""

    def __init__(self, on_notify: NotifyHandler, on_lost: Callable[[SpoeConnection], None]) -> None:
        self._on_notify = on_notify
        self._on_lost = on_lost
        self._connections: set[SpoeConnection] = set()
        self.num_protocol_errors = 0
        self.last_error = ""

    def make_connection(self) -> SpoeConnection:
        """The protocol factory for the event loop's server."""
        connection = SpoeConnection(self._on_notify, self._forget, self._count_error)
        self._connections.add(connection)
        return connection

    def close(self) -> None:
        """Close all connections; HAProxy then balances by itself."""
        for connection in list(self._connections):
            connection.close()

    def _forget(self, connection: SpoeConnection) -> None:
        self._connections.discard(connection)
        self._on_lost(connection)

    def _count_error(self, message: str) -> None:
        self.num_protocol_errors += 1
        self.last_error = message

    def __repr__(self) -> str:
        return f"<SpoeAgent connections={len(self._connections)} errors={self.num_protocol_errors}>"


def text_argument(arguments: Arguments, name: bytes) -> str:
    """Return a string argument, empty if it is absent or of another type."""
    value = arguments.get(name)
    if not isinstance(value, bytes):
        return ""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace")
