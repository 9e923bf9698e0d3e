"""A rank's process: loads its part of a model, then computes each step that rank 0 posts.

Dies with the engine. Ignores SIGTERM and SIGINT: a drain is the engine's affair. Must not know requests.
"""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from headrace.engine.process import is_retryable
from headrace.engine.threads import limit_spinning
from headrace.engine.workers.links import KEY_BYTES, Door, listen
from headrace.engine.workers.messages import (
    Join,
    KvBlocks,
    RankChanged,
    RankChannel,
    RankFailed,
    RankListens,
    RankReady,
)
from headrace.errors import EngineDead, HeadraceError, text_of
from headrace.lifetime import die_with_parent

if TYPE_CHECKING:
    from headrace.engine.model_files.metadata import Hyperparameters
    from headrace.engine.operations.exchange import Exchange
    from headrace.engine.runner import DecoderRunner
    from headrace.engine.workers.mailbox import Mailbox

_JOIN_LIMIT_S = 600.0
"""Longest wait for the engine's first word, and for its number of KV blocks: it may pack a large model."""
_LOOK_UP_S = 0.5
"""A rank without a step looks so often whether its engine is there."""


class RankSeat:
    """A rank's place in the group, seen from the rank."""

    def __init__(self, channel: RankChannel, join: Join, door: Door | None = None) -> None:
        """door: None: it shares memory with the others."""
        self._channel = channel
        self._join = join
        self._door = door
        self.mailbox: Mailbox | None = None

    def join(self, h: Hyperparameters) -> Exchange:
        if self._door is not None:
            return self._join_linked(h, self._door)
        from headrace.engine.operations.exchange import Exchange
        from headrace.engine.operations.kernels import load_kernels
        from headrace.engine.operations.shard import cut
        from headrace.engine.operations.shared_memory import SharedMemory
        from headrace.engine.workers.mailbox import Mailbox

        join, library = self._join, load_kernels()
        memory = SharedMemory(join.sizes, self._channel.take_descriptor())
        self.mailbox = Mailbox(library, memory)
        shard = cut(h, join.spec.tensor_parallel)[join.rank]
        return Exchange(library, memory, shard, [self._channel.fileno()], join.meeting_limit_s)

    def _join_linked(self, h: Hyperparameters, door: Door) -> Exchange:
        from headrace.engine.workers.linked import join_linked

        join = self._join
        place = (join.rank, join.spec.tensor_parallel)
        exchange, self.mailbox = join_linked(h, place, door, join, self._check)
        return exchange

    def _check(self) -> None:
        if self._channel.is_closed():
            raise EngineDead("the engine is gone")

    def agree_on_blocks(self, _plan: Callable[[], int]) -> int:
        return _expect(self._channel, KvBlocks).num_blocks


def serve(channel: RankChannel, key: bytes = b"") -> None:
    """Load and compute until the engine is gone. key: of ranks that share no memory. Raises what loading and
    steps raise."""
    limit_spinning()
    door = None
    if key:
        door = Door(listen(channel.own_host), key)
        channel.send(RankListens(*door.address))
    import torch

    from headrace.engine.model_files.resolve import resolve_model
    from headrace.engine.runner import load_runner

    join = _expect(channel, Join)
    seat = RankSeat(channel, join, door)
    runner = load_runner(join.spec, resolve_model(join.spec.model), lambda _phase: None, seat)
    assert seat.mailbox is not None
    channel.send(RankReady(runner.path))
    gc.collect()
    gc.freeze()
    with torch.inference_mode():
        _compute(channel, runner, seat.mailbox)


def _compute(channel: RankChannel, runner: DecoderRunner, mailbox: Mailbox) -> None:
    from headrace.engine.workers.mailbox import Command

    while not channel.is_closed():
        if not mailbox.wait(_LOOK_UP_S):
            continue
        command, step = mailbox.read()
        if step is not None:
            runner.execute(step)
        elif command == Command.WAKE:
            channel.send(RankChanged(_error_of(runner.wake)))
        else:
            runner.sleep(1 if command == Command.SLEEP_1 else 2)
            channel.send(RankChanged())


def _error_of(change: Callable[[], None]) -> str:
    try:
        change()
    except (HeadraceError, MemoryError) as error:
        return text_of(error)
    return ""


_Kind = TypeVar("_Kind", Join, KvBlocks)


def _expect(channel: RankChannel, kind: type[_Kind]) -> _Kind:
    """Return the engine's next word, which must be of this kind. Raises EngineDead."""
    message = channel.receive(_JOIN_LIMIT_S)
    if not isinstance(message, kind):
        raise EngineDead(f"the engine said {type(message).__name__} and not {kind.__name__}")
    return message


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; return its exit status: 0 the engine is gone, 1 failed, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.engine.workers", description="Started by an engine."
    )
    parser.add_argument("--fd", type=int, required=True, help="inherited UNIX stream socket to the engine")
    parser.add_argument("--title", default="", help="process title")
    parser.add_argument("--linked", action="store_true", help="it shares no memory; the key is on stdin")
    arguments = parser.parse_args(argv)
    if arguments.title:
        from setproctitle import setproctitle

        setproctitle(arguments.title)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()  # a parent that ended before this is noticed by its closed socket
    try:
        channel = RankChannel(socket.socket(fileno=arguments.fd))
    except OSError as error:
        print(f"rank: --fd {arguments.fd} is not a socket: {error}", file=sys.stderr)
        return 2
    try:
        serve(channel, sys.stdin.buffer.read(KEY_BYTES) if arguments.linked else b"")
    except Exception as error:  # whatever it is, the engine must be told before this process ends
        return _report(channel, error)
    return 0


def _report(channel: RankChannel, error: Exception) -> int:
    """Say why this rank ends, unless it is because the engine or another rank did; return the exit status."""
    if isinstance(error, EngineDead):
        return 0
    if isinstance(error, HeadraceError):
        text = str(error)
    else:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {error}"
    try:
        channel.send(RankFailed(text, is_retryable(error)))
    except EngineDead:
        return 0
    return 1
