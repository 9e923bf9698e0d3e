"""`python -m headrace.engine.workers.holder SOCKET RANK`: starts one rank, where a launcher wants it to be.

Goes to the engine's socket whenever there is an engine, starts the rank's process when it says so, and ends
it when the engine is gone. The rank has a socket of its own to the engine: nothing of a step passes here.
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
from headrace.engine.workers.local import describe_status, spawn_rank
from headrace.engine.workers.messages import (
    EndRank,
    HolderHere,
    RankChannel,
    RankEnded,
    RankStarted,
    StartRank,
)
from headrace.errors import EngineDead

_RETRY_S = 0.1
"""How often it looks whether an engine listens."""
_FOREVER_S = 3600.0
_END_LIMIT_S = 5.0


class Holder:
    """Serves one engine after another."""

    def __init__(self, path: str, rank: int) -> None:
        self._path = path
        self._rank = rank

    def __repr__(self) -> str:
        return f"<Holder of rank {self._rank} at {self._path}>"

    def serve_one(self) -> None:
        """Wait for an engine, and serve it until it is gone. Raises OSError where it can never be reached."""
        channel = RankChannel(self._connect())
        try:
            channel.send(HolderHere(self._rank, headrace.__version__))
            while True:
                self._start(channel)
        except EngineDead:
            pass  # the engine is gone, or will not have us
        finally:
            channel.close()

    def _connect(self) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
                return connection
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                connection.close()
                time.sleep(_RETRY_S)

    def _start(self, channel: RankChannel) -> None:
        """Start the rank when the engine says so, and stay until it ended. Raises EngineDead."""
        start = _next(channel)
        if not isinstance(start, StartRank):
            return  # an order to end what has ended already
        descriptor = channel.take_descriptor()
        try:
            process = spawn_rank(descriptor, start.title)
        except OSError as error:
            channel.send(RankEnded(f"it cannot be started: {error}"))
            return
        finally:
            os.close(descriptor)  # only the rank has it: its end is seen at once
        try:
            channel.send(RankStarted(process.pid))
            _watch(channel, process)
        finally:
            how = _end(process)
        channel.send(RankEnded(how))


def _next(channel: RankChannel) -> object:
    """The engine's next word, however long it takes: its end is a word, too. Raises EngineDead."""
    while (message := channel.receive(_FOREVER_S)) is None:
        pass
    return message


def _watch(channel: RankChannel, process: subprocess.Popen[bytes]) -> None:
    """Return when the process ended or is to end. Raises EngineDead."""
    exits = os.pidfd_open(process.pid)
    try:
        while not isinstance(channel.receive(0.0), EndRank):
            if exits in select.select([channel.fileno(), exits], [], [])[0]:
                return
    finally:
        os.close(exits)


def _end(process: subprocess.Popen[bytes]) -> str:
    """Kill it; say how it ended."""
    process.kill()
    try:
        return describe_status(process.pid, process.wait(_END_LIMIT_S))
    except subprocess.TimeoutExpired:
        return f"pid {process.pid} is in the kernel's hands: it ends when a system call does"


def main() -> int:
    path, rank = sys.argv[1:]
    from setproctitle import setproctitle

    setproctitle(f"headrace: holder of rank {rank}")
    holder = Holder(path, int(rank))
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            holder.serve_one()
            time.sleep(_RETRY_S)  # one that was sent away does not come at once again
    return 0


if __name__ == "__main__":
    sys.exit(main())
