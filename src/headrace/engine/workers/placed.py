"""Starts ranks through holders, processes that a launcher put where the ranks are to be (`holder`).

Owns the socket on which holders come while the engine starts. A holder of this machine gets its rank's end of
a socket pair; those of others come through tunnels, and are told where to connect their ranks to. Must not
know who placed them, or what ranks compute.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import time
from collections.abc import Sequence
from types import TracebackType

import headrace
from headrace.engine.workers.links import KEY_BYTES, Meeting, accept, listen
from headrace.engine.workers.local import title_of
from headrace.engine.workers.messages import (
    Call,
    EndRank,
    HolderHere,
    Message,
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
DIAL_LIMIT_S = 8.0
"""For a holder to connect its rank to the engine; then it can still say that it could not."""
_END_LIMIT_S = 5.0
_POLL_S = 0.2
_BACKLOG = 64


class PlacedRank:
    """A rank's process, whose parent is a holder."""

    def __init__(
        self, holder: RankChannel, channel: RankChannel, pid: int, meeting: Meeting | None = None
    ) -> None:
        """Take over both channels. meeting: where it meets the others, if they share no memory."""
        self.channel = channel
        self.meeting = meeting
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

    def __init__(self, path: str, own_address: str = "", ranks: Sequence[int] = ()) -> None:
        """Listen on the socket `path`, for its owner only, and for tunnels that bring holders from other
        machines. own_address: of this one; if some holder of `ranks` has another, no ranks share memory.
        Empty: all are here. Raises OSError."""
        self._path = path
        self._own_address = own_address
        self._ranks = ranks
        self._listener = bind_private_socket(path)
        self._listener.listen(_BACKLOG)
        self._waiting: dict[int, RankChannel] = {}
        self._addresses: dict[int, str] = {}
        """Of the nodes of those that came last."""
        self._meeting: Meeting | None = None
        self._is_decided = False
        """Whether ranks share memory."""

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
        """A `RankStarter`: have the holder of `rank` start it, as soon as there is one; where some may be
        elsewhere, as soon as there are all. Raises EngineDead, OSError."""
        if self._own_address and not self._is_decided:
            self._decide()
        holder = self._await_holder(rank)
        try:
            return self._start_here(rank, holder) if self._meeting is None else self._call(rank, holder)
        except BaseException:
            holder.close()
            raise

    def _decide(self) -> None:
        """Wait until all holders are here, and see where they are."""
        for each in self._ranks:
            self._waiting[each] = self._await_holder(each)
        if any(self._addresses[each] not in ("", self._own_address) for each in self._ranks):
            self._meeting = Meeting(self._own_address, secrets.token_bytes(KEY_BYTES))
        self._is_decided = True

    def _start_here(self, rank: int, holder: RankChannel) -> PlacedRank:
        """Hand over the rank's end of a socket pair."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                holder.send(StartRank(title_of(rank)), (theirs.fileno(),))
            return PlacedRank(holder, RankChannel(ours), self._pid_of(rank, holder))
        except EngineDead:
            ours.close()
            raise

    def _call(self, rank: int, holder: RankChannel) -> PlacedRank:
        """Have the holder connect the rank to us."""
        assert self._meeting is not None
        with listen(self._own_address) as listener:
            host, port = listener.getsockname()
            holder.send(StartRank(title_of(rank), Call(host, port, self._meeting.key)))
            link = self._await_call(rank, listener, holder)
        channel = RankChannel(link)
        try:
            return PlacedRank(holder, channel, self._pid_of(rank, holder), self._meeting)
        except EngineDead:
            channel.close()
            raise

    def _await_call(self, rank: int, listener: socket.socket, holder: RankChannel) -> socket.socket:
        assert self._meeting is not None
        deadline_s = time.monotonic() + _ANSWER_LIMIT_S
        while time.monotonic() < deadline_s:
            accepted = accept(listener, self._meeting.key)
            if accepted is not None and accepted[0] == rank:
                return accepted[1]
            if accepted is not None:
                accepted[1].close()
            if (answer := holder.receive(0.0)) is not None:
                raise _not_started(rank, answer)
        raise EngineDead(
            f"rank {rank} was not started: it has not connected to {self._own_address} within "
            f"{_ANSWER_LIMIT_S:g} s"
        )

    def _pid_of(self, rank: int, holder: RankChannel) -> int:
        answer = holder.receive(_ANSWER_LIMIT_S)
        if not isinstance(answer, RankStarted):
            raise _not_started(rank, answer)
        return answer.pid

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
        self._addresses[here.rank] = here.address


def _not_started(rank: int, answer: Message | None) -> EngineDead:
    why = answer.description if isinstance(answer, RankEnded) else f"its holder said {answer}"
    return EngineDead(f"rank {rank} was not started: {why}")
