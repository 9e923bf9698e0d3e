"""Serves the router's metrics on a UNIX socket, for HAProxy, which offers them on its metrics port.

One answer per connection, whatever is asked: HAProxy has checked the request. Must not know what is measured.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from headrace.observability.router_metrics import CONTENT_TYPE

MAX_HEAD_BYTES = 16_384
TIMEOUT_S = 5.0


async def serve_metrics(exposition: Callable[[], bytes], sock: socket.socket) -> asyncio.Server:
    """Listen on a bound UNIX socket; `exposition` returns the body."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await reader.readuntil(b"\r\n\r\n")
                body = exposition()
                head = (
                    f"HTTP/1.1 200 OK\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\n"
                    "connection: close\r\n\r\n"
                )
                writer.write(head.encode() + body)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the scraper left or spoke no HTTP; there is nobody to answer
        finally:
            writer.close()

    return await asyncio.start_unix_server(handle, sock=sock, limit=MAX_HEAD_BYTES)
