"""The ranks of one engine, seen from rank 0: started, joined, told what to compute, watched, ended.

Rank 0 is the engine's own process. How the others are started is a `RankStarter`'s affair: child processes
(`local`), or where a launcher placed a holder for each (`placed`). Must not know requests or how a step is
computed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from headrace.api.messages import EngineSpec
from headrace.engine.workers.links import Address, Door, Meeting, listen
from headrace.engine.workers.messages import (
    Join,
    KvBlocks,
    RankChanged,
    RankChannel,
    RankFailed,
    RankListens,
    RankReady,
)
from headrace.errors import ConfigError, EngineDead, HeadraceError, ModelError

if TYPE_CHECKING:
    from headrace.engine.model_files.metadata import Hyperparameters
    from headrace.engine.operations.exchange import Exchange
    from headrace.engine.operations.kernels import Library
    from headrace.engine.protocol import StepInput
    from headrace.engine.workers.mailbox import Command, Mailbox

READY_LIMIT_S = 600.0
"""Longest wait for another rank's weights once rank 0 has its own."""
CHANGE_LIMIT_S = 300.0
"""Longest wait for another rank to sleep or wake: waking may read weights from disk."""
_MEETING_LIMIT_S = 20.0
_POLL_S = 0.2
_LOOK_S = 0.01
_LAST_WORD_S = 1.0


class Rank(Protocol):
    """One rank that was started."""

    @property
    def channel(self) -> RankChannel:
        """The socket to it."""
        ...

    @property
    def meeting(self) -> Meeting | None:
        """Where all ranks of the group meet; None: they share memory."""
        ...

    def describe_end(self) -> str:
        """How it ended; for one whose socket is closed. Waits a few seconds at most."""
        ...

    def close(self) -> None:
        """End it, whatever it does; return when it has, or after a few seconds."""
        ...


RankStarter = Callable[[int], Rank]
"""Starts rank N (1 or more); it will connect at once and wait to be told what to load. Raises OSError."""


class WorkerGroup:
    """Ranks 1 to N - 1, and rank 0's seat among them. Its ranks end when it is closed or no longer used."""

    def __init__(
        self, spec: EngineSpec, start_rank: RankStarter, meeting_limit_s: float = _MEETING_LIMIT_S
    ) -> None:
        """Start all ranks. Raises OSError."""
        self._spec = spec
        self._meeting_limit_s = meeting_limit_s
        self._ranks: list[Rank] = []
        self._finalizer = weakref.finalize(self, _close, self._ranks)
        for rank in range(1, spec.tensor_parallel):
            self._ranks.append(start_rank(rank))
        self._mailbox: Mailbox | None = None

    def __repr__(self) -> str:
        return f"<WorkerGroup of {self.num_ranks}: {self._ranks!r}>"

    @property
    def num_ranks(self) -> int:
        return self._spec.tensor_parallel

    @property
    def is_linked(self) -> bool:
        """Whether ranks share no memory, because some are on other machines."""
        return any(each.meeting is not None for each in self._ranks)

    def close(self) -> None:
        """End all ranks."""
        self._finalizer()

    # ---- loading: this is rank 0's Seat

    def join(self, h: Hyperparameters) -> Exchange:
        from headrace.engine.kv_memory import longest_context
        from headrace.engine.operations.exchange import exchange_sizes
        from headrace.engine.operations.kernels import KernelsMissing, load_kernels
        from headrace.engine.workers.mailbox import shared_sizes

        spec = self._spec
        try:
            library = load_kernels()
        except KernelsMissing as missing:
            raise ConfigError(
                [f"tensor_parallel is {self.num_ranks}; it must be 1 here: {missing}"]
            ) from missing
        most_blocks = -(-longest_context(spec, h) // spec.block_size)
        sizes = shared_sizes(library, spec.token_budget, spec.max_running, most_blocks)
        sizes |= exchange_sizes(h, spec.token_budget)
        meeting = self._ranks[0].meeting
        if meeting is None:
            return self._share_memory(h, library, sizes)
        return self._connect(h, meeting, sizes)

    def _share_memory(self, h: Hyperparameters, library: Library, sizes: dict[str, int]) -> Exchange:
        from headrace.engine.operations.exchange import Exchange
        from headrace.engine.operations.shard import cut
        from headrace.engine.operations.shared_memory import SharedMemory
        from headrace.engine.workers.mailbox import Mailbox

        memory = SharedMemory(sizes)
        for index, each in enumerate(self._ranks):
            join = Join(self._spec, index + 1, sizes, self._meeting_limit_s)
            each.channel.send(join, (memory.descriptor,))
        self._mailbox = Mailbox(library, memory)
        watched = [each.channel.fileno() for each in self._ranks]
        shard = cut(h, self.num_ranks)[0]
        return Exchange(library, memory, shard, watched, self._meeting_limit_s)

    def _connect(self, h: Hyperparameters, meeting: Meeting, sizes: dict[str, int]) -> Exchange:
        from headrace.engine.workers.linked import join_linked

        addresses: dict[int, Address] = {}
        for index, each in enumerate(self._ranks):
            said = self._receive(each, READY_LIMIT_S)
            if not isinstance(said, RankListens):
                raise EngineDead(f"rank {index + 1} said {said} and not where it listens")
            addresses[index + 1] = (said.host, said.port)
        door = Door(listen(meeting.host), meeting.key)
        addresses[0] = door.address
        joins = [
            Join(self._spec, rank, sizes, self._meeting_limit_s, addresses) for rank in range(self.num_ranks)
        ]
        for join, each in zip(joins[1:], self._ranks, strict=True):
            each.channel.send(join)
        exchange, self._mailbox = join_linked(h, (0, self.num_ranks), door, joins[0], self.check)
        return exchange

    def agree_on_blocks(self, plan: Callable[[], int]) -> int:
        num_blocks = plan()
        for each in self._ranks:
            each.channel.send(KvBlocks(num_blocks))
        return num_blocks

    def wait_ready(self, path: str) -> None:
        """Return when every rank waits for steps. Raises what a rank failed with, and EngineDead."""
        for index, each in enumerate(self._ranks):
            ready = self._receive(each, READY_LIMIT_S)
            if not isinstance(ready, RankReady) or ready.path != path:
                raise EngineDead(f"rank {index + 1} said {ready}; rank 0 computes in {path}")

    # ---- steps and commands

    def post_step(self, batch: StepInput) -> StepInput:
        """Have all ranks begin a step; return it as rank 0 must compute it."""
        assert self._mailbox is not None, "a step before ranks have joined"
        return self._mailbox.post_step(batch)

    def post(self, command: Command) -> None:
        """Have all other ranks sleep or wake: `wait_changed` says when they have."""
        assert self._mailbox is not None, "a command before ranks have joined"
        self._mailbox.post(command)

    def wait_changed(self) -> str:
        """Return when every other rank has done as it was told, or could not: why not. Raises EngineDead."""
        errors = []
        for index, each in enumerate(self._ranks):
            changed = self._receive(each, CHANGE_LIMIT_S)
            if not isinstance(changed, RankChanged):
                raise EngineDead(f"rank {index + 1} said {changed} and not whether it sleeps")
            if changed.error:
                errors.append(f"rank {index + 1}: {changed.error}")
        return "; ".join(errors)

    # ---- health

    def check(self) -> None:
        """Raise an error if some rank is gone: what it said last, or how it ended."""
        for each in self._ranks:
            if each.channel.is_closed():
                raise self._end_of(each)

    def explain(self, error: EngineDead) -> HeadraceError:
        """Return why ranks did not meet, where it is known better than `error` says."""
        deadline_s = time.monotonic() + (_LAST_WORD_S if self.is_linked else 0.0)
        while True:
            for each in self._ranks:
                if each.channel.is_closed():
                    return self._end_of(each)
            if time.monotonic() >= deadline_s:
                return error
            time.sleep(_LOOK_S)  # of connections that end together one may be seen before the other

    def _receive(self, rank: Rank, limit_s: float) -> object:
        """The next word of a rank, while all are alive."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            message = rank.channel.receive(_POLL_S) if not rank.channel.is_closed() else None
            if isinstance(message, RankFailed):
                raise self._failure(rank, message)
            if message is not None:
                return message
            self.check()
        raise EngineDead(f"rank {self._number(rank)} has not answered within {limit_s:g} s: it hangs")

    def _end_of(self, rank: Rank) -> HeadraceError:
        """Why a rank whose socket is closed ended."""
        try:
            while (message := rank.channel.receive(_LAST_WORD_S)) is not None:
                if isinstance(message, RankFailed):
                    return self._failure(rank, message)
        except EngineDead:
            pass  # it said nothing
        return EngineDead(f"rank {self._number(rank)} was lost: {rank.describe_end()}")

    def _failure(self, rank: Rank, failed: RankFailed) -> HeadraceError:
        text = f"rank {self._number(rank)}: {failed.error}"
        return EngineDead(text) if failed.is_retryable else ModelError(text)

    def _number(self, rank: Rank) -> int:
        return self._ranks.index(rank) + 1


def _close(ranks: list[Rank]) -> None:
    for each in ranks:
        each.close()
