"""The relay's second pass: a request that was read whole goes to HAProxy's internal listener.

Owns that socket. Must not know what the request is, or what becomes of its answer.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import Protocol

UPLOAD_BYTES = 262_144
"""Written at a time."""
READ_BYTES = 65_536


class UpstreamClient(Protocol):
    """Whose request it is."""

    def pass_on(self, data: bytes) -> None:
        """Take a piece of the answer."""
        ...

    def body_sent(self) -> None:
        """The body is gone, or not wanted any more."""
        ...

    def answer_ended(self) -> None:
        """The other side closed."""
        ...


class Upstream:
    """The second pass towards HAProxy. The body goes out in slices, as fast as HAProxy takes it.

    A plain socket instead of a transport: HAProxy may refuse and close before it has read the body, and a
    transport whose write fails drops what is still to be read, which is that refusal.
    """

    def __init__(self, client: UpstreamClient, head: bytes, body: bytearray) -> None:
        self._client: UpstreamClient | None = client
        self._unsent: deque[memoryview] = deque((memoryview(head), memoryview(body)))
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._is_reading_paused = False

    async def connect(self, path: str) -> None:
        """Connect and begin. Raises OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await self._loop.sock_connect(connection, path)
        except BaseException:
            connection.close()
            raise
        if self._client is None:
            connection.close()
            return
        self._socket = connection
        self._loop.add_writer(connection, self._send)
        if not self._is_reading_paused:
            self._loop.add_reader(connection, self._receive)

    def _send(self) -> None:
        assert self._socket is not None
        try:
            sent = self._socket.send(self._unsent[0][:UPLOAD_BYTES])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # closed on the other side: what it answered before that is still to be read
            self._forget_body()
            return
        self._unsent[0] = self._unsent[0][sent:]
        if not self._unsent[0]:
            self._unsent.popleft()
        if not self._unsent:
            self._forget_body()

    def _forget_body(self) -> None:
        if self._socket is not None and self._loop.remove_writer(self._socket):
            self._unsent.clear()
            if self._client is not None:
                self._client.body_sent()

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            client, self._client = self._client, None
            if client is not None:
                client.answer_ended()
            return
        self._forget_body()  # answered before it had the whole body: a refusal
        if self._client is not None:
            self._client.pass_on(data)

    def _close(self) -> None:
        if self._socket is not None:
            self._loop.remove_writer(self._socket)
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        self._unsent.clear()

    def pause_reading(self) -> None:
        self._is_reading_paused = True
        if self._socket is not None:
            self._loop.remove_reader(self._socket)

    def resume_reading(self) -> None:
        self._is_reading_paused = False
        if self._socket is not None:
            self._loop.add_reader(self._socket, self._receive)

    def abort(self) -> None:
        """Drop the connection; the client is told nothing more."""
        self._client = None
        self._close()
