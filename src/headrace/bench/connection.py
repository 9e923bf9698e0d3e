"""Connections to the server under load: one exchange at a time each, received bytes stamped at once.

Owns HTTP/1.1 towards the server and the reuse of connections. Must not know the workload or what events mean.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

import httptools

from headrace.bench.answer import AnswerRecorder
from headrace.bench.record import ErrorKind, RequestRecord
from headrace.bench.target import Target

CONNECT_TIMEOUT_S = 10.0


class Connection(asyncio.Protocol):
    """One connection. `exchange` writes a request; its future ends with the answer, whatever the end is."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._received_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: AnswerRecorder | None = None
        self._ended: asyncio.Future[None] | None = None
        self._keep_alive = False
        self.num_exchanges = 0
        # httptools finds the callbacks below by name.
        self._parser: Any = httptools.HttpResponseParser(self)

    @property
    def is_usable(self) -> bool:
        """It can carry another exchange."""
        return self._transport is not None and not self._transport.is_closing() and self._answer is None

    def exchange(self, request: bytes, answer: AnswerRecorder) -> asyncio.Future[None]:
        """Send a request whose answer goes to `answer`. The future never fails: the record says how it
        went."""
        assert self.is_usable, "one exchange at a time, on an open connection"
        assert self._transport is not None
        self._answer = answer
        self._ended = asyncio.get_running_loop().create_future()
        self.num_exchanges += 1
        self._transport.write(request)
        return self._ended

    def close(self) -> None:
        """Close at once; an exchange in progress ends as it stands."""
        if self._transport is not None:
            self._transport.abort()

    # ---- called by the event loop ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted by class: uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received_s = self._now_s()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._answer is not None:
                self._answer.record.fail(ErrorKind.MALFORMED, f"not an HTTP answer: {error}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end(self._now_s())

    # ---- called by the HTTP parser ----

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._answer is not None and status >= 200:  # 1xx: the answer is still to come
            self._answer.status = status

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(body, self._received_s)

    def on_message_complete(self) -> None:
        if self._answer is None or self._answer.status == 0:
            return
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        self._end(self._received_s)

    def _end(self, now_s: float) -> None:
        answer, ended = self._answer, self._ended
        self._answer = self._ended = None
        if answer is not None:
            answer.finish(now_s)
        if ended is not None and not ended.done():
            ended.set_result(None)


class ConnectionPool:
    """Connections to one target, reused; at most `max_open` at a time."""

    def __init__(
        self, target: Target, now_s: Callable[[], float], *, timeout_s: float, max_open: int
    ) -> None:
        self._target = target
        self._now_s = now_s
        self._timeout_s = timeout_s
        self._max_open = max_open
        self._num_open = 0
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if target.is_tls else None

    def __repr__(self) -> str:
        return f"<ConnectionPool {self._target.address}: {self._num_open} busy, {len(self._idle)} idle>"

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def exchange(self, body: bytes, record: RequestRecord) -> None:
        """Send one request and fill its record. Never raises for what the server or the network does."""
        if self._num_open >= self._max_open:
            record.end_s = self._now_s()
            record.fail(ErrorKind.CLIENT_LIMIT, f"{self._max_open} connections are open, the most allowed")
            return
        self._num_open += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(self._target.head(len(body)) + body, record)
        except TimeoutError:
            record.fail(ErrorKind.TIMEOUT, f"no complete answer within {self._timeout_s:g} s")
            record.end_s = self._now_s()
        finally:
            self._num_open -= 1

    async def _exchange(self, request: bytes, record: RequestRecord) -> None:
        while True:
            connection = await self._connect(record)
            if connection is None:
                record.end_s = self._now_s()
                return
            answer = AnswerRecorder(record)
            try:
                await connection.exchange(request, answer)
            except asyncio.CancelledError:
                connection.close()
                raise
            if connection.is_usable:
                self._idle.append(connection)
            # A server may close an idle connection just as we write to it. That is no failure of the
            # request: it is sent once more, on a connection that nobody can have closed for idleness.
            was_idle_close = record.error == ErrorKind.DISCONNECTED and connection.num_exchanges > 1
            if not was_idle_close:
                return
            record.error = record.error_detail = ""
            record.end_s = 0.0

    async def _connect(self, record: RequestRecord) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._now_s),
                    self._target.host,
                    self._target.port,
                    ssl=self._tls,
                    server_hostname=self._target.host if self._tls else None,
                )
        except TimeoutError:
            record.fail(ErrorKind.CONNECT, f"no connection within {CONNECT_TIMEOUT_S:g} s")
            return None
        except OSError as error:
            record.fail(ErrorKind.CONNECT, f"{self._target.address}: {error}")
            return None
        if not connection.is_usable:
            record.fail(ErrorKind.CONNECT, "the server closed the connection at once")
            return None
        return connection
