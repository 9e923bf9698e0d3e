"""Asks the gateway whether it answers HTTP at its public address.

Must not know: what the answer says; any HTTP answer is a sign of life.
"""

from __future__ import annotations

import asyncio
import contextlib

from headrace.api.config import split_address

PROBE_LIMIT_S = 2.0
_REQUEST = b"GET /health HTTP/1.1\r\nHost: headrace\r\nConnection: close\r\n\r\n"
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}  # noqa: S104, compared only


async def probe_gateway(bind: str) -> bool:
    """Whether something speaks HTTP at `bind`, within two seconds."""
    host, port = split_address(bind)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            reader, writer = await asyncio.open_connection(_LOOPBACK.get(host, host), port)
            writer.write(_REQUEST)
            return (await reader.read(5)) == b"HTTP/"
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
