"""Framed messages over UNIX stream sockets, for asyncio: one Channel per connection, mode 0600 listeners.

Owns buffers and their limits. A peer that sends nonsense or stops reading is cut off, never waited for.
Must not know: what the messages mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.errors import ProtocolError
from headrace.private_socket import bind_private_socket

MAX_BUFFERED_BYTES = 8 * 1024 * 1024
"""Most bytes that wait for a peer which does not read; beyond it the connection is cut."""


class Channel(asyncio.Protocol):
    """One connection. `on_message` gets every decoded message, `on_close` the reason, exactly once."""

    def __init__(
        self,
        message_type: Any,
        on_message: Callable[[Channel, Any], None],
        on_close: Callable[[Channel, str], None],
    ) -> None:
        self._decoder: FrameDecoder[Any] = FrameDecoder(message_type)
        self._on_message = on_message
        self._on_close = on_close
        self._transport: asyncio.Transport | None = None
        self._close_reason = ""

    def __repr__(self) -> str:
        return f"Channel({'open' if self.is_open else 'closed'})"

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._on_message(self, message)
        except ProtocolError as error:
            self.close(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_close(self, self._close_reason or str(exc or "the other side closed the connection"))

    def send(self, message: Any) -> None:
        """Send a message; nothing happens on a closed connection (its `on_close` tells the owner)."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(encode_frame(message))
        if self._transport.get_write_buffer_size() > MAX_BUFFERED_BYTES:
            self.close("the other side does not read")

    def close(self, reason: str = "closed here", *, flush: bool = False) -> None:
        """Close; flush: what was sent before is delivered first, if the other side reads."""
        if self._transport is None:
            return
        self._close_reason = reason
        if flush:
            self._transport.close()
        else:
            self._transport.abort()


async def listen(path: str, make_channel: Callable[[], Channel]) -> asyncio.Server:
    """Listen on `path` with mode 0600, replacing a socket that a dead listener left there."""
    listener = bind_private_socket(path)
    try:
        return await asyncio.get_running_loop().create_unix_server(make_channel, sock=listener)
    except BaseException:
        listener.close()
        raise


async def connect(path: str, channel: Channel, timeout_s: float) -> None:
    """Connect `channel` to a listener at `path`. Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        await loop.create_unix_connection(lambda: channel, path)
