"""Ranks at several addresses: who is let in, and what meetings make of ranks that are late, lost or wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.unit.engine.rank_rig import rank_sizes
from tests.unit.engine.test_shard import SMOLLM2

from headrace.engine.operations.kernels import Library
from headrace.engine.operations.linked_exchange import LinkedExchange
from headrace.engine.operations.shard import column_starts, cut
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.workers import links as links_module
from headrace.engine.workers.links import KEY_BYTES, connect_ranks, listen
from headrace.errors import EngineDead

KEY = bytes(range(KEY_BYTES))
Links = dict[int, socket.socket]


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    found = [listen(f"127.0.0.{number}") for number in (1, 2, 3)]
    yield found
    for listener in found:
        listener.close()


def connect_all(listeners: list[socket.socket]) -> list[Links]:
    addresses = {rank: listener.getsockname() for rank, listener in enumerate(listeners)}
    with ThreadPoolExecutor(len(listeners)) as pool:
        tasks = [pool.submit(connect_ranks, r, own, addresses, KEY) for r, own in enumerate(listeners)]
        return [task.result(20) for task in tasks]


def close(*all_links: Links) -> None:
    for links in all_links:
        for link in links.values():
            link.close()


def test_every_rank_is_connected_to_every_other_from_its_own_address(listeners: list[socket.socket]) -> None:
    all_links = connect_all(listeners)
    for rank, links in enumerate(all_links):
        assert sorted(links) == [other for other in range(3) if other != rank]
        for other, link in links.items():
            assert link.getpeername()[0] == f"127.0.0.{other + 1}"
            assert link.getsockname()[0] == f"127.0.0.{rank + 1}"
            link.send(bytes([rank, other]))
    for rank, links in enumerate(all_links):
        for other, link in links.items():
            link.settimeout(5.0)
            assert link.recv(2) == bytes([other, rank])
    close(*all_links)


def test_who_does_not_know_the_key_is_turned_away_and_disturbs_nobody(listeners: list[socket.socket]) -> None:
    strangers = []
    for said in (
        b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
        links_module._HELLO.pack(b"headrace ranks 1", 1, bytes(32)),
    ):
        stranger = socket.create_connection(listeners[0].getsockname())
        stranger.sendall(said + bytes(32))  # no proof
        strangers.append(stranger)
    all_links = connect_all(listeners[:2])
    assert all_links[0][1].getpeername()[0] == "127.0.0.2"
    for stranger in strangers:
        stranger.close()
    close(*all_links)


def test_a_listener_that_does_not_know_the_key_is_no_rank(listeners: list[socket.socket]) -> None:
    def play() -> None:
        link, _ = listeners[0].accept()
        with link:
            link.recv(1000)
            link.sendall(bytes(64))
            link.recv(1000)

    thread = threading.Thread(target=play)
    thread.start()
    addresses = {rank: listener.getsockname() for rank, listener in enumerate(listeners[:2])}
    with pytest.raises(EngineDead, match="does not know this start's key"):
        connect_ranks(1, listeners[1], addresses, KEY)
    thread.join(10)


def test_a_rank_that_never_comes_is_named(
    listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "CONNECT_LIMIT_S", 0.1)
    listeners[0].settimeout(0.05)
    addresses = {rank: listener.getsockname() for rank, listener in enumerate(listeners[:2])}
    with pytest.raises(EngineDead, match=r"rank 1 has not connected within 0\.1 s"):
        connect_ranks(0, listeners[0], addresses, KEY)
    listeners[0].close()
    with pytest.raises(EngineDead, match=r"rank at 127\.0\.0\.1:\d+ cannot be reached: Connection refused"):
        connect_ranks(1, listeners[1], addresses, KEY)


def exchange_of(library: Library, rank: int, links: Links, limit_s: float = 20.0) -> LinkedExchange:
    shard, memory = cut(SMOLLM2, 2)[rank], SharedMemory(rank_sizes(SMOLLM2))
    return LinkedExchange(library, memory, shard, column_starts(SMOLLM2, 2), links, limit_s)


def test_columns_that_do_not_fit_into_any_buffer_arrive_whole(
    library: Library, listeners: list[socket.socket]
) -> None:
    all_links = connect_all(listeners[:2])
    doors = [exchange_of(library, rank, links) for rank, links in enumerate(all_links)]
    width, middle = SMOLLM2.vocab_size, cut(SMOLLM2, 2)[1].vocab.start  # 64 rows: 12 MB in all

    def share(rank: int) -> torch.Tensor:
        columns = (range(middle), range(middle, width))[rank]
        own = torch.arange(64 * len(columns), dtype=torch.float32).view(64, -1) + rank
        return doors[rank].gather("logits", columns, own, width).clone()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(share, (0, 1))
    assert torch.equal(first, second)
    assert first[0, middle] == 1
    close(*all_links)


def test_ranks_that_are_late_or_lost_end_the_meeting(
    library: Library, listeners: list[socket.socket]
) -> None:
    all_links = connect_all(listeners[:2])
    late = exchange_of(library, 0, all_links[0], 0.05)
    rows = late.rows("output", 1, SMOLLM2.hidden_size)
    with pytest.raises(EngineDead, match=r"rank 1 has not come within 0\.05 s: it hangs"):
        late.share_columns("output", rows)
    close(all_links[1])
    lost = exchange_of(library, 0, all_links[0])
    with pytest.raises(EngineDead, match="a rank was lost"):
        lost.share_columns("output", rows)
    close(all_links[0])


def test_a_part_of_another_meeting_is_not_taken_for_this_one(
    library: Library, listeners: list[socket.socket]
) -> None:
    all_links = connect_all(listeners[:2])
    door = exchange_of(library, 0, all_links[0])
    rows = door.rows("output", 1, SMOLLM2.hidden_size)
    all_links[1][0].sendall(bytes(16 + rows.nbytes))
    with pytest.raises(EngineDead, match="a rank was lost"):
        door.share_columns("output", rows)
    close(*all_links)
