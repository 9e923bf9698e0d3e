"""What rank 0 makes of what other ranks say, do not say, or say wrongly. The ranks are played by the test."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.unit.engine.test_shard import SMOLLM2

from headrace.api.messages import EngineSpec
from headrace.engine.workers import group as group_module
from headrace.engine.workers.group import Rank, WorkerGroup
from headrace.engine.workers.links import Meeting
from headrace.engine.workers.mailbox import Command
from headrace.engine.workers.messages import (
    Join,
    KvBlocks,
    RankChanged,
    RankChannel,
    RankFailed,
    RankReady,
)
from headrace.errors import EngineDead, ModelError

pytestmark = pytest.mark.usefixtures("library")
SPEC = EngineSpec("native", "m", tensor_parallel=3, token_budget=8, max_running=2)


class PlayedRank:
    """The engine's view of a rank, and the rank's own end of the socket."""

    meeting: Meeting | None = None

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel = RankChannel(ours)
        self.own_end = RankChannel(theirs)
        self.is_closed = False

    def describe_end(self) -> str:
        return "it was played"

    def close(self) -> None:
        self.is_closed = True
        self.channel.close()
        self.own_end.close()


@contextmanager
def played_group() -> Iterator[tuple[WorkerGroup, list[PlayedRank]]]:
    ranks: list[PlayedRank] = []

    def start(rank: int) -> Rank:
        assert rank == len(ranks) + 1
        ranks.append(PlayedRank())
        return ranks[-1]

    group = WorkerGroup(SPEC, start)
    yield group, ranks
    group.close()
    assert all(rank.is_closed for rank in ranks)


def test_ranks_are_told_what_to_load_and_given_the_memory() -> None:
    with played_group() as (group, ranks):
        exchange = group.join(SMOLLM2)
        assert (exchange.shard.rank, exchange.shard.num_ranks) == (0, 3)
        assert group.agree_on_blocks(lambda: 12) == 12
        for index, rank in enumerate(ranks):
            join = rank.own_end.receive(1.0)
            assert isinstance(join, Join)
            assert (join.spec, join.rank) == (SPEC, index + 1)
            descriptor = rank.own_end.take_descriptor()
            pages = [-(-size // 4096) for size in join.sizes.values()]
            assert os.fstat(descriptor).st_size == 4096 * sum(pages)
            os.close(descriptor)
            assert rank.own_end.receive(1.0) == KvBlocks(12)
            rank.own_end.send(RankReady("int8, 1 thread"))
        group.wait_ready("int8, 1 thread")
        group.check()


def test_a_rank_with_another_arithmetic_cannot_take_part() -> None:
    with played_group() as (group, ranks):
        for rank in ranks:
            rank.own_end.send(RankReady("float32, 1 thread"))
        with pytest.raises(EngineDead, match=r"rank 1 said RankReady.*float32.*rank 0 computes in int8"):
            group.wait_ready("int8, 1 thread")


@pytest.mark.parametrize(("is_retryable", "kind"), [(True, EngineDead), (False, ModelError)])
def test_what_a_rank_fails_with_is_the_engines_error(is_retryable: bool, kind: type[Exception]) -> None:
    with played_group() as (group, ranks):
        ranks[0].own_end.send(RankReady("p"))
        ranks[1].own_end.send(RankFailed("no such file", is_retryable))
        with pytest.raises(kind, match="rank 2: no such file"):
            group.wait_ready("p")


def test_a_rank_that_left_is_noticed_whoever_is_asked() -> None:
    with played_group() as (group, ranks):
        ranks[1].own_end.send(RankFailed("MemoryError", True))
        ranks[1].own_end.close()
        with pytest.raises(EngineDead, match="rank 2: MemoryError"):
            group.check()
        with pytest.raises(EngineDead, match="rank 2"):
            group.wait_ready("p")
    with played_group() as (group, ranks):
        ranks[0].own_end.close()
        assert str(group.explain(EngineDead("a rank was lost"))) == "rank 1 was lost: it was played"
        with pytest.raises(EngineDead, match="rank 1 was lost: it was played"):
            group.wait_ready("p")


def test_a_silent_rank_is_given_up_when_the_limit_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "READY_LIMIT_S", 0.05)
    monkeypatch.setattr(group_module, "_POLL_S", 0.01)
    with (
        played_group() as (group, _),
        pytest.raises(EngineDead, match=r"rank 1 has not answered within 0\.05 s"),
    ):
        group.wait_ready("p")


def test_ranks_say_whether_they_could_wake() -> None:
    with played_group() as (group, ranks):
        group.join(SMOLLM2)
        group.post(Command.WAKE)
        ranks[0].own_end.send(RankChanged())
        ranks[1].own_end.send(RankChanged("no memory"))
        assert group.wait_changed() == "rank 2: no memory"
        for rank in ranks:
            rank.own_end.send(RankChanged())
        assert group.wait_changed() == ""


def test_bytes_that_are_no_message_lose_the_rank() -> None:
    ours, theirs = socket.socketpair()
    channel = RankChannel(ours)
    theirs.sendall(b"\x00\x00\x00\x02\xff\xff")
    with pytest.raises(EngineDead, match="not a message"):
        channel.receive(1.0)
    theirs.close()
    with pytest.raises(EngineDead, match="closed"):
        channel.receive(1.0)
    channel.close()
