"""`python -m headrace.replica.relay JSON`: reads bodies whose `model` HAProxy cannot see.

HAProxy inspects only the head of a body. The few requests whose model lies beyond it come here, are read
whole, and go back to HAProxy's internal listener with their model in a header. JSON is a RelaySpec.
Owns the process, its listening socket and its bounds. Must not know endpoints, replicas or the router.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys

import msgspec
import uvloop
from setproctitle import setproctitle

from headrace.api.messages import RelaySpec
from headrace.clock import Clock, SystemClock
from headrace.lifetime import die_with_parent
from headrace.private_socket import bind_private_socket
from headrace.replica.http_messages import AnswerHeads
from headrace.replica.relay_connection import RelayConnection

MAX_CONNECTIONS = 4096
BACKLOG = 4096
"""A UNIX socket refuses at once when it is full, unlike TCP."""
SWEEP_S = 0.25
FD_LIMIT = 3 * MAX_CONNECTIONS


class Relay:
    """The relay: a listening socket, and one RelayConnection per request."""

    def __init__(self, spec: RelaySpec, clock: Clock) -> None:
        self.spec = spec
        self.clock = clock
        self.heads = AnswerHeads("", clock.wall_s)
        self._connections: set[RelayConnection] = set()
        self._num_held_bytes = 0

    def __repr__(self) -> str:
        return f"<Relay {len(self._connections)} requests, {self._num_held_bytes} bytes>"

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, and then until the last open request has ended. Raises OSError."""
        loop = asyncio.get_running_loop()
        listener = bind_private_socket(self.spec.socket)
        try:
            server = await loop.create_unix_server(
                lambda: RelayConnection(self), sock=listener, backlog=BACKLOG
            )
        except OSError:
            listener.close()
            raise
        try:
            while not stop.is_set() or self._connections:
                for connection in list(self._connections):
                    connection.check_time_limits(self.clock.now_s())
                if stop.is_set():
                    server.close()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SWEEP_S):
                        await (asyncio.sleep(SWEEP_S) if stop.is_set() else stop.wait())
        finally:
            server.close()
            for connection in list(self._connections):
                connection.abort()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.spec.socket)

    # ---- what connections ask

    def joined(self, connection: RelayConnection) -> bool:
        has_room = len(self._connections) < MAX_CONNECTIONS
        self._connections.add(connection)
        return has_room

    def left(self, connection: RelayConnection) -> None:
        self._connections.discard(connection)

    def reserve(self, num_bytes: int) -> bool:
        if num_bytes > 0 and self._num_held_bytes + num_bytes > self.spec.max_total_bytes:
            return False
        self._num_held_bytes += num_bytes
        return True


def main(arguments: list[str]) -> int:
    """Run a relay until SIGTERM, SIGINT or the parent's end; return its exit status: 2 for wrong use."""
    if len(arguments) != 1:
        print("relay: give one argument, a RelaySpec as JSON", file=sys.stderr)
        return 2
    try:
        spec = msgspec.json.decode(arguments[0], type=RelaySpec)
    except msgspec.DecodeError as error:
        print(f"relay: the argument is not a RelaySpec: {error}", file=sys.stderr)
        return 2
    if not die_with_parent():
        print("relay: the parent ended during the start", file=sys.stderr)
        return 2
    setproctitle("headrace: relay")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (FD_LIMIT if hard == resource.RLIM_INFINITY else min(FD_LIMIT, hard), hard)
    )
    try:
        uvloop.run(_serve(spec))
    except OSError as error:
        print(f"relay: cannot serve on {spec.socket}: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(spec: RelaySpec) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Relay(spec, SystemClock()).run(stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
