"""Holders that come to an engine, late, twice, wrongly or not at all. They are played by the test."""

from __future__ import annotations

import math
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import headrace
from headrace.engine.workers import placed
from headrace.engine.workers.links import dial
from headrace.engine.workers.messages import (
    EndRank,
    HolderHere,
    Message,
    RankChannel,
    RankEnded,
    RankReady,
    RankStarted,
    StartRank,
)
from headrace.engine.workers.placed import Lobby, PlacedRank
from headrace.errors import EngineDead

LIMIT_S = 10.0


class Stage:
    """A lobby, the holders that the test plays, and the ranks that it got. All are closed at the end."""

    def __init__(self, path: str, own_address: str = "", ranks: Sequence[int] = ()) -> None:
        self.path = path
        self.lobby = Lobby(path, own_address, ranks)
        self.links: list[socket.socket] = []
        self._channels: list[RankChannel] = []
        self._threads: list[threading.Thread] = []

    def come(self, rank: int, version: str = headrace.__version__, address: str = "") -> RankChannel:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self.path)
        holder = RankChannel(connection)
        self._channels.append(holder)
        holder.send(HolderHere(rank, version, address))
        return holder

    def answer(self, holder: RankChannel, *answers: Message, to: type = StartRank) -> None:
        """Have the holder wait for a word and say its own."""

        def play() -> None:
            assert isinstance(holder.receive(LIMIT_S), to)
            for each in answers:
                holder.send(each)

        self.play(play)

    def play(self, act: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=act))
        self._threads[-1].start()

    def start_rank(self, rank: int) -> PlacedRank:
        started = self.lobby.start_rank(rank)
        self._channels += [started.channel, started._holder]
        return started

    def close(self) -> None:
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        for channel in self._channels:
            for descriptor in channel._descriptors:
                os.close(descriptor)
            channel.close()
        for link in self.links:
            link.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(str(tmp_path / "ranks.sock"))
    with stage.lobby:
        assert stat.S_IMODE(os.stat(stage.path).st_mode) == 0o600
        yield stage
        stage.close()
    assert not os.path.exists(stage.path)


def test_ranks_are_started_by_their_holders_in_whatever_order_these_come(stage: Stage) -> None:
    holders = {rank: stage.come(rank) for rank in (2, 1)}
    for rank in (1, 2):
        stage.answer(holders[rank], RankStarted(100 + rank))
        started = stage.start_rank(rank)
        assert repr(started) == f"<PlacedRank pid {100 + rank}>"
        own_end = RankChannel(socket.socket(fileno=holders[rank].take_descriptor()))
        own_end.send(RankReady("p"))
        assert started.channel.receive(LIMIT_S) == RankReady("p")
        own_end.close()
        assert started.channel.is_closed()
        holders[rank].send(RankEnded("pid 7 ended with signal 9"))
        assert started.describe_end() == "pid 7 ended with signal 9"
        started.close()  # it ended: nothing is waited for


def test_of_two_holders_of_a_rank_the_later_one_counts(stage: Stage) -> None:
    stage.come(1).close()
    earlier, later, other = stage.come(1), stage.come(1), stage.come(2)
    stage.answer(other, RankStarted(5))
    stage.start_rank(2)
    stage.answer(later, RankStarted(6))
    assert repr(stage.start_rank(1)) == "<PlacedRank pid 6>"
    with pytest.raises(EngineDead):
        earlier.receive(LIMIT_S)


def test_a_rank_is_ended_by_its_holder(stage: Stage) -> None:
    holder = stage.come(1)
    stage.answer(holder, RankStarted(5))
    rank = stage.start_rank(1)
    stage.answer(holder, RankEnded("pid 5 ended with signal 9"), to=EndRank)
    rank.close()


def test_a_rank_whose_holder_is_gone_is_gone(stage: Stage) -> None:
    holder = stage.come(1)
    stage.answer(holder, RankStarted(5))
    rank = stage.start_rank(1)
    holder.close()
    assert rank.describe_end() == "pid 5 ended, and its holder with it"
    rank.close()


def test_one_that_cannot_start_its_rank_says_why(stage: Stage) -> None:
    stage.answer(stage.come(1), RankEnded("it cannot be started: no memory"))
    with pytest.raises(EngineDead, match="rank 1 was not started: it cannot be started: no memory"):
        stage.start_rank(1)


def test_another_version_is_refused_in_words(stage: Stage) -> None:
    stage.come(1, "0.0.1")
    with pytest.raises(EngineDead, match=r"the host of rank 1 has headrace 0\.0\.1, and the engine has"):
        stage.start_rank(1)


def test_who_never_comes_or_says_nonsense_is_missed_in_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed, "HOLDER_LIMIT_S", 0.1)
    monkeypatch.setattr(placed, "_POLL_S", 0.02)
    monkeypatch.setattr(placed, "_ANSWER_LIMIT_S", 0.02)
    stage.come(2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nonsense:
        nonsense.connect(stage.path)
        nonsense.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(EngineDead, match=r"rank 1 has no host: none has come to .* within 0\.1 s"):
            stage.start_rank(1)


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Stage]:
    """An engine at 127.0.0.1 whose ranks 1 and 2 may be elsewhere."""
    stage = Stage(str(tmp_path / "ranks.sock"), "127.0.0.1", (1, 2))
    with stage.lobby:
        yield stage
        stage.close()


def play_elsewhere(stage: Stage, rank: int, address: str) -> RankChannel:
    """A holder that connects its rank from `address`."""
    holder = stage.come(rank, address=address)

    def play() -> None:
        start = holder.receive(LIMIT_S)
        assert isinstance(start, StartRank)
        assert start.call is not None
        assert str(start.call.key) not in repr(start)
        where = (start.call.host, start.call.port)
        stage.links.append(dial(rank, address, where, start.call.key, lambda: None, math.inf))
        holder.send(RankStarted(100 + rank))

    stage.play(play)
    return holder


def test_as_soon_as_one_holder_is_elsewhere_all_ranks_meet_at_the_engines_address(wide: Stage) -> None:
    play_elsewhere(wide, 1, "127.0.0.1")
    play_elsewhere(wide, 2, "127.0.0.2")
    ranks = [wide.start_rank(rank) for rank in (1, 2)]
    assert [repr(rank) for rank in ranks] == ["<PlacedRank pid 101>", "<PlacedRank pid 102>"]
    for number, rank in enumerate(ranks):
        assert rank.meeting == ranks[0].meeting
        assert rank.channel.own_host == "127.0.0.1"
        own_end = RankChannel(wide.links[number])
        own_end.send(RankReady("p"))
        assert rank.channel.receive(LIMIT_S) == RankReady("p")
        assert not rank.channel.is_closed()
        own_end.close()
        assert rank.channel.is_closed()
    assert ranks[0].meeting is not None
    assert ranks[0].meeting.host == "127.0.0.1"
    assert repr(ranks[0].meeting) == "Meeting('127.0.0.1')"


def test_holders_that_are_all_on_the_engines_node_get_its_memory(wide: Stage) -> None:
    for rank in (2, 1):
        wide.answer(wide.come(rank, address="127.0.0.1"), RankStarted(7))
    for rank in (1, 2):
        assert wide.start_rank(rank).meeting is None


def test_a_holder_that_cannot_reach_the_engine_says_so(wide: Stage) -> None:
    play_elsewhere(wide, 1, "127.0.0.2")
    wide.answer(wide.come(2, address="127.0.0.2"), RankEnded("rank at 127.0.0.1:1 cannot be reached"))
    wide.start_rank(1)
    with pytest.raises(EngineDead, match=r"rank 2 was not started: rank at .* cannot be reached"):
        wide.start_rank(2)


def test_a_holder_that_never_connects_its_rank_is_missed_in_time(
    wide: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed, "_ANSWER_LIMIT_S", 0.1)
    wide.come(2, address="127.0.0.2")
    wide.answer(wide.come(1, address="127.0.0.2"))
    with pytest.raises(EngineDead, match=r"rank 1 was not started: it has not connected to 127\.0\.0\.1"):
        wide.start_rank(1)
