"""Asks one gateway's HAProxy whether it lives, on its own socket: the public port is shared among gateways.

Must not know: what the answer says; any HTTP answer is a sign of life.
"""

from __future__ import annotations

import asyncio

PROBE_LIMIT_S = 2.0
_REQUEST = b"GET / HTTP/1.1\r\nHost: headrace\r\nConnection: close\r\n\r\n"


async def probe_gateway(socket_path: str) -> bool:
    """Whether something speaks HTTP on the UNIX socket, within two seconds."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            writer.write(_REQUEST)
            return (await reader.read(5)) == b"HTTP/"
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.transport.abort()
