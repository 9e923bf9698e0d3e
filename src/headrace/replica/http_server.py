"""The HTTP server: a listening socket, its connections, and the clock that enforces their limits.

Must not know what the handler answers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from headrace.clock import Clock
from headrace.cluster_tls import server_context
from headrace.errors import RequestError
from headrace.private_socket import bind_private_socket
from headrace.replica.http2_connection import Http2Connection
from headrace.replica.http2_heads import AnswerBlocks
from headrace.replica.http_connection import Connection, HttpConnection
from headrace.replica.http_entry import HttpEntry
from headrace.replica.http_messages import AnswerHeads, HttpLimits, HttpRequest
from headrace.replica.http_responder import Responder

Handler = Callable[[HttpRequest, Responder], None]
_log = logging.getLogger(__name__)


class _InternalError(RequestError):
    """A bug of ours, met while answering."""

    code = "internal_error"


class HttpServer:
    """Serves `handler` on one address until closed."""

    def __init__(self, handler: Handler, limits: HttpLimits, heads: AnswerHeads, clock: Clock) -> None:
        self._handler = handler
        self.limits = limits
        self.heads = heads
        self.clock = clock
        self._blocks = AnswerBlocks(heads)
        self._connections: set[Connection] = set()
        self._num_receiving_bytes = 0
        self._servers: list[asyncio.Server] = []
        self._sweep: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"HttpServer({len(self._connections)} connections)"

    async def listen(self, host: str, port: int, identity: str = "") -> str:
        """Start to serve; return host:port with the real port. identity: as in ReplicaSpec.

        Raises OSError if the address is taken, ConfigError for an identity that cannot be used.
        """
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: self._make_entry(is_trusted=bool(identity)),
            host,
            port,
            backlog=1024,
            ssl=server_context(Path(identity)) if identity else None,
            ssl_handshake_timeout=self.limits.head_timeout_s if identity else None,
        )
        self._servers.append(server)
        name = server.sockets[0].getsockname()
        self._schedule_sweep()
        is_ipv6 = server.sockets[0].family == socket.AF_INET6
        return f"[{name[0]}]:{name[1]}" if is_ipv6 else f"{name[0]}:{name[1]}"

    async def listen_unix(self, path: str) -> None:
        """Serve on a UNIX socket as well, for its owner only. Raises OSError."""
        listener = bind_private_socket(path)
        try:
            # A connection beyond the backlog is refused, not delayed as with TCP.
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(
                lambda: self._make_entry(is_trusted=True), sock=listener, backlog=4096
            )
        except OSError:
            listener.close()
            raise
        self._servers.append(server)

    def _make_entry(self, *, is_trusted: bool) -> HttpEntry:
        call_soon = asyncio.get_running_loop().call_soon
        return HttpEntry(
            self,
            lambda: HttpConnection(self, is_trusted=is_trusted),
            lambda: Http2Connection(self, self._blocks, call_soon, is_trusted=is_trusted),
        )

    def _schedule_sweep(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(self.limits.sweep_s, self._run_sweep)

    def _run_sweep(self) -> None:
        now_s = self.clock.now_s()
        for connection in list(self._connections):
            connection.check_time_limits(now_s)
        self._schedule_sweep()

    # ---- what connections ask

    def joined(self, connection: Connection) -> bool:
        has_room = len(self._connections) < self.limits.max_connections
        self._connections.add(connection)
        return has_room

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def reserve(self, num_bytes: int) -> bool:
        if num_bytes > 0 and self._num_receiving_bytes + num_bytes > self.limits.max_receiving_bytes:
            return False
        self._num_receiving_bytes += num_bytes
        return True

    def handle(self, request: HttpRequest, responder: Responder) -> None:
        try:
            self._handler(request, responder)
        except Exception:
            # One request must not take the connection loop down; the traceback is the bug report.
            _log.exception("answering %s %s failed", request.method, request.path)
            responder.send_error(_InternalError("the server failed at this request; see its log"))

    # ---- the end

    def close_idle(self) -> None:
        """Stop listening, and close connections that wait for nothing."""
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.close_if_idle()

    async def close(self, grace_s: float = 1.0) -> None:
        """Stop listening, let unsent bytes go for `grace_s`, then drop all connections."""
        self.close_idle()
        deadline_s = self.clock.now_s() + grace_s
        while self._connections and self.clock.now_s() < deadline_s:
            for connection in list(self._connections):
                connection.close_if_idle()
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.abort()
        if self._sweep is not None:
            self._sweep.cancel()
