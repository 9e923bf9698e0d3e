"""`python -m headrace.engine.workers.holder SOCKET RANK [ADDRESS]`: starts a rank where a launcher wants.

Goes to the engine's socket whenever there is an engine, starts the rank's process when it says so, and ends
it when the engine is gone. The rank has its own connection to the engine: nothing of a step passes here.
ADDRESS: of this node, if the engine may be on another one. Then SOCKET is the end of a tunnel, whose loss is
not the engine's; such a rank sees that by itself, or is ended when the next engine comes.
Must not know what a rank computes, or who placed it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time

import headrace
from headrace.engine.workers.links import dial
from headrace.engine.workers.local import describe_status, spawn_rank
from headrace.engine.workers.messages import (
    Call,
    EndRank,
    HolderHere,
    RankChannel,
    RankEnded,
    RankStarted,
    StartRank,
)
from headrace.engine.workers.placed import DIAL_LIMIT_S
from headrace.errors import EngineDead

_RETRY_S = 0.1
"""How often it looks whether an engine listens."""
_MAX_RETRY_S = 0.5
"""How often through a tunnel, where each look costs a handshake with another machine."""
_END_LIMIT_S = 5.0


class Holder:
    """Serves one engine after another."""

    def __init__(self, path: str, rank: int, address: str = "") -> None:
        self._path = path
        self._rank = rank
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self._is_linked = False
        """Whether the rank is connected to an engine elsewhere."""
        self._starter: RankChannel | None = None
        """Who hears of the rank's end: the engine that had it started."""

    def __repr__(self) -> str:
        return f"<Holder of rank {self._rank} at {self._path}>"

    def serve_one(self) -> bool:
        """Wait for an engine, and serve it until it is gone; whether it wanted something. Raises OSError
        where it can never be reached."""
        channel = RankChannel(self._connect())
        was_wanted = False
        try:
            channel.send(HolderHere(self._rank, headrace.__version__, self._address))
            while True:
                self._obey(channel, self._next(channel))
                was_wanted = True
        except EngineDead:
            return was_wanted  # the engine is gone, or will not have us, or the way to it is lost
        finally:
            channel.close()
            if not self._is_linked:
                self._end()

    def _connect(self) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
                return connection
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                connection.close()
                time.sleep(_RETRY_S)

    def _next(self, channel: RankChannel) -> StartRank | EndRank | None:
        """The engine's next word, however long it takes; None: the rank ended. Raises EngineDead."""
        exits = None if self._process is None else os.pidfd_open(self._process.pid)
        watched = [channel.fileno()] + ([exits] if exits is not None else [])
        try:
            while True:
                message = channel.receive(0.0)
                if isinstance(message, StartRank | EndRank):
                    return message
                if exits in select.select(watched, [], [])[0]:
                    return None
        finally:
            if exits is not None:
                os.close(exits)

    def _obey(self, channel: RankChannel, order: StartRank | EndRank | None) -> None:
        """Raises EngineDead where the engine is gone."""
        if isinstance(order, StartRank):
            self._end()  # of an engine that is gone, if it hangs
            answer = self._start(channel, order)
            channel.send(answer)
        elif self._process is not None:  # else it is an order to end what has ended already
            ended = RankEnded(self._end())
            if self._starter is channel:
                channel.send(ended)

    def _start(self, channel: RankChannel, start: StartRank) -> RankStarted | RankEnded:
        """Start the rank. Raises EngineDead where nothing came that it can have."""
        self._is_linked, self._starter = start.call is not None, channel
        key = b"" if start.call is None else start.call.key
        try:
            descriptor = channel.take_descriptor() if start.call is None else self._dial(start.call)
        except EngineDead as error:
            if start.call is None:
                raise
            return RankEnded(str(error))
        try:
            self._process = spawn_rank(descriptor, start.title, key)
            return RankStarted(self._process.pid)
        except OSError as error:
            return RankEnded(f"it cannot be started: {error}")
        finally:
            os.close(descriptor)  # only the rank has it: its end is seen at once

    def _dial(self, call: Call) -> int:
        """Return a connection to the engine. Raises EngineDead: it cannot be reached."""
        deadline_s = time.monotonic() + DIAL_LIMIT_S
        link = dial(self._rank, self._address, (call.host, call.port), call.key, lambda: None, deadline_s)
        return link.detach()

    def _end(self) -> str:
        """Kill the rank, if there is one; say how it ended."""
        process, self._process = self._process, None
        if process is None:
            return ""
        process.kill()
        try:
            return describe_status(process.pid, process.wait(_END_LIMIT_S))
        except subprocess.TimeoutExpired:
            return f"pid {process.pid} is in the kernel's hands: it ends when a system call does"


def main() -> int:
    path, rank, *address = sys.argv[1:]
    from setproctitle import setproctitle

    setproctitle(f"headrace: holder of rank {rank}")
    holder = Holder(path, int(rank), *address)
    delay_s = _RETRY_S
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            was_wanted = holder.serve_one()
            delay_s = _RETRY_S if was_wanted or not address else min(2 * delay_s, _MAX_RETRY_S)
            time.sleep(delay_s)  # one that was sent away does not come at once again
    return 0


if __name__ == "__main__":
    sys.exit(main())
