"""Whether another machine answers at all, asked on a connection of its own.

Must not know: what would be said there.
"""

from __future__ import annotations

import asyncio

from headrace.api.notation import split_address

PROBE_LIMIT_S = 0.5


async def answers(address: str, limit_s: float) -> bool:
    """Connect to host:port and leave. One that refuses answers, too; an address that is none does not."""
    try:
        host, port = split_address(address)
        async with asyncio.timeout(limit_s):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):  # TimeoutError is an OSError
        return False
    writer.close()
    return True
