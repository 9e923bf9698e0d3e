"""Starts ranks through holders, processes that a launcher put where the ranks are to be (`holder`).

Owns the socket on which holders come while the engine starts. Must not know who placed them, or what ranks
compute.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from types import TracebackType

import headrace
from headrace.engine.workers.local import title_of
from headrace.engine.workers.messages import (
    EndRank,
    HolderHere,
    RankChannel,
    RankEnded,
    RankStarted,
    StartRank,
)
from headrace.errors import EngineDead
from headrace.private_socket import bind_private_socket

HOLDER_LIMIT_S = 120.0
"""Longest wait for a rank's holder: Ray may start its host actor later than ours, from a cold disk."""
_ANSWER_LIMIT_S = 10.0
_END_LIMIT_S = 5.0
_POLL_S = 0.2
_BACKLOG = 64


class PlacedRank:
    """A rank's process, whose parent is a holder."""

    def __init__(self, holder: RankChannel, channel: RankChannel, pid: int) -> None:
        """Take over both."""
        self.channel = channel
        self._holder = holder
        self._pid = pid
        self._is_ended = False

    def __repr__(self) -> str:
        return f"<PlacedRank pid {self._pid}>"

    def describe_end(self) -> str:
        try:
            ended = self._holder.receive(_END_LIMIT_S)
        except EngineDead:
            return f"pid {self._pid} ended, and its holder with it"
        if isinstance(ended, RankEnded):
            self._is_ended = True
            return ended.description
        return f"pid {self._pid} closed its socket and lives"

    def close(self) -> None:
        self.channel.close()
        with contextlib.suppress(EngineDead):  # without its holder it ends by itself
            if not self._is_ended:
                self._holder.send(EndRank())
                self._holder.receive(_END_LIMIT_S)
        self._holder.close()


class Lobby:
    """Where holders wait until the engine has them start their ranks. Of several for one rank: the latest."""

    def __init__(self, path: str) -> None:
        """Listen on the socket `path`, for its owner only. Raises OSError."""
        self._path = path
        self._listener = bind_private_socket(path)
        self._listener.listen(_BACKLOG)
        self._waiting: dict[int, RankChannel] = {}

    def __repr__(self) -> str:
        return f"<Lobby {self._path}, ranks {sorted(self._waiting)} wait>"

    def __enter__(self) -> Lobby:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for holder in self._waiting.values():
            holder.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def start_rank(self, rank: int) -> PlacedRank:
        """A `RankStarter`: have the holder of `rank` start it, as soon as there is one. Raises EngineDead."""
        holder = self._await_holder(rank)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                holder.send(StartRank(title_of(rank)), (theirs.fileno(),))
            answer = holder.receive(_ANSWER_LIMIT_S)
            if not isinstance(answer, RankStarted):
                why = answer.description if isinstance(answer, RankEnded) else f"its holder said {answer}"
                raise EngineDead(f"rank {rank} was not started: {why}")
        except EngineDead:
            ours.close()
            holder.close()
            raise
        return PlacedRank(holder, RankChannel(ours), answer.pid)

    def _await_holder(self, rank: int) -> RankChannel:
        deadline_s = time.monotonic() + HOLDER_LIMIT_S
        while time.monotonic() < deadline_s:
            holder = self._waiting.pop(rank, None)
            if holder is not None and not holder.is_closed():
                return holder
            if select.select([self._listener], [], [], _POLL_S)[0]:
                with contextlib.suppress(OSError):  # it left before it was let in
                    self._let_in(self._listener.accept()[0])
        raise EngineDead(
            f"rank {rank} has no host: none has come to {self._path} within {HOLDER_LIMIT_S:g} s"
        )

    def _let_in(self, connection: socket.socket) -> None:
        holder = RankChannel(connection)
        try:
            here = holder.receive(_ANSWER_LIMIT_S)
        except EngineDead:
            here = None
        if not isinstance(here, HolderHere) or here.version != headrace.__version__:
            holder.close()
            if isinstance(here, HolderHere):
                raise EngineDead(
                    f"the host of rank {here.rank} has headrace {here.version}, and the engine has "
                    f"{headrace.__version__}; install the same version on all nodes"
                )
            return
        earlier = self._waiting.pop(here.rank, None)
        if earlier is not None:
            earlier.close()
        self._waiting[here.rank] = holder
