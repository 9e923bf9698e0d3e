"""A connection before it is known what it speaks: its first bytes decide between HTTP/1.1 and HTTP/2.

Must not know either of them beyond HTTP/2's preface. Source: RFC 9113, 3.3 (prior knowledge).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from headrace.replica.http2_frames import PREFACE
from headrace.replica.http_connection import ConnectionOwner

MakeProtocol = Callable[[], asyncio.Protocol]


class HttpEntry(asyncio.Protocol):
    """Hands its transport to a protocol made by `make_http1` or `make_http2`."""

    def __init__(self, owner: ConnectionOwner, make_http1: MakeProtocol, make_http2: MakeProtocol) -> None:
        self._owner = owner
        self._make_http1 = make_http1
        self._make_http2 = make_http2
        self._transport: asyncio.Transport | None = None
        self._data = b""
        self._since_s = owner.clock.now_s()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._owner.joined(self):
            self._become(self._make_http1())  # which says that there are too many

    def data_received(self, data: bytes) -> None:
        self._data = data = self._data + data
        if data.startswith(PREFACE):
            self._data = data[len(PREFACE) :]
            self._become(self._make_http2())
        elif not PREFACE.startswith(data):
            self._become(self._make_http1())

    def _become(self, protocol: asyncio.Protocol) -> None:
        transport, self._transport = self._transport, None
        assert transport is not None
        self._owner.left(self)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._data:
            protocol.data_received(self._data)

    def eof_received(self) -> None:
        """The client left without a word. The transport closes."""

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._owner.left(self)

    def close_if_idle(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def check_time_limits(self, now_s: float) -> None:
        limits = self._owner.limits
        limit_s = limits.head_timeout_s if self._data else limits.keep_alive_s
        if self._transport is not None and now_s - self._since_s > limit_s:
            self._transport.close()
