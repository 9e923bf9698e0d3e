"""Asks one gateway's HAProxy whether it lives, on its own sockets: the public port is shared among gateways.

Owns what tells a HAProxy that hangs from one that is busy. At its limit of connections it takes no probe, but
its runtime API, which no client can fill, still speaks; one that is stopped says nothing on either.
Must not know: what the answers say; any byte is a sign of life.
"""

from __future__ import annotations

import asyncio

from headrace.api.run_paths import alive_socket_path, relay_socket_path, runtime_socket_path
from headrace.clock import Clock
from headrace.control.gateway_state import GatewayState

PROBE_LIMIT_S = 2.0
_REQUEST = b"GET / HTTP/1.1\r\nHost: headrace\r\nConnection: close\r\n\r\n"
_COMMAND = b"show version\n"


async def watch_gateway(
    state: GatewayState, gateway_id: str, run_dir: str, wake: asyncio.Event, clock: Clock
) -> None:
    """Probe a gateway's HAProxy and relay for ever, and tell `state`; sets `wake` when something changed."""
    pair = state.pairs[gateway_id]
    sockets = alive_socket_path(run_dir, gateway_id), relay_socket_path(run_dir, gateway_id)
    while True:
        has_answered, has_relay_answered = await asyncio.gather(*map(probe_gateway, sockets))
        if has_relay_answered:
            pair.relay.heard_s = clock.now_s()
        if has_answered != pair.has_answered:
            wake.set()
        is_silent = not has_answered and await keeps_silent(runtime_socket_path(run_dir, gateway_id))
        state.on_probe(gateway_id, has_answered, clock.now_s(), is_silent=is_silent)
        await asyncio.sleep(1.0 if has_answered else 0.1)


async def probe_gateway(socket_path: str) -> bool:
    """Whether something speaks HTTP on the UNIX socket, within two seconds."""
    try:
        return (await _ask(socket_path, _REQUEST, 5)) == b"HTTP/"
    except (OSError, TimeoutError):
        return False


async def keeps_silent(socket_path: str) -> bool:
    """Whether a process holds the UNIX socket of HAProxy's runtime API and says nothing for two seconds. One
    that refuses or closes the connection is dead, or about to be, which its parent notices."""
    try:
        await _ask(socket_path, _COMMAND, 1)
    except (TimeoutError, BlockingIOError):  # the latter: so many wait that the kernel takes no more
        return True
    except OSError:
        return False
    return False


async def _ask(socket_path: str, request: bytes, num_bytes: int) -> bytes:
    """Return the beginning of an answer. Raises OSError; TimeoutError after PROBE_LIMIT_S."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            writer.write(request)
            return await reader.read(num_bytes)
    finally:
        if writer is not None:
            writer.transport.abort()
