"""Starts ranks as child processes of the engine, on its machine.

They are in the engine's process group and die with it (`lifetime`). Must not know what they compute.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

from headrace.engine.workers.links import Meeting
from headrace.engine.workers.messages import RankChannel

_END_LIMIT_S = 5.0
_OUR_TITLES = "headrace: "


class LocalRank:
    """One child process."""

    meeting: Meeting | None = None
    """It shares the engine's memory."""

    def __init__(self, rank: int) -> None:
        """Start it. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = spawn_rank(theirs.fileno(), title_of(rank))
        self.channel = RankChannel(ours)

    def __repr__(self) -> str:
        return f"<LocalRank pid {self._process.pid}>"

    def describe_end(self) -> str:
        try:
            status = self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"pid {self._process.pid} closed its socket and lives"
        return describe_status(self._process.pid, status)

    def close(self) -> None:
        self.channel.close()
        self._process.kill()
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass  # in the kernel's hands: it ends when a system call does


def start_local_rank(rank: int) -> LocalRank:
    """A `RankStarter`: start `rank` beside this process. Raises OSError."""
    return LocalRank(rank)


def spawn_rank(descriptor: int, title: str, key: bytes = b"") -> subprocess.Popen[bytes]:
    """Start a rank's process as a child of this one, whose socket `descriptor` is. key: of ranks that share
    no memory; it gets it where nobody else reads it. Raises OSError."""
    command = [sys.executable, "-m", "headrace.engine.workers", "--fd", str(descriptor), "--title", title]
    process = subprocess.Popen(
        [*command, "--linked"] if key else command,
        pass_fds=[descriptor],
        stdin=subprocess.PIPE if key else subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # its end says more
            process.stdin.write(key)
    return process


def describe_status(pid: int, status: int) -> str:
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"pid {pid} ended with {how}"


def title_of(rank: int) -> str:
    """The engine's own title, where it has one, and the rank."""
    from setproctitle import getproctitle

    title = getproctitle()
    return f"{title if title.startswith(_OUR_TITLES) else _OUR_TITLES + 'engine'} rank {rank}"
