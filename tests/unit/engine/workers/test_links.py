"""Ranks at several addresses: who is let in, and what meetings make of ranks that are late, lost or wrong."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch
from tests.unit.engine.rank_rig import rank_sizes
from tests.unit.engine.test_shard import SMOLLM2
from tests.unit.engine.workers.test_mailbox import a_step

from headrace.engine.operations.kernels import Library
from headrace.engine.operations.linked_exchange import LinkedExchange
from headrace.engine.operations.shard import column_starts, cut
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.protocol import StepInput
from headrace.engine.workers import links as links_module
from headrace.engine.workers.links import KEY_BYTES, connect_ranks, listen
from headrace.engine.workers.mailbox import Command, LinkedMailbox
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
        connect_ranks(0, listeners[0], addresses, KEY, limit_s=0.1)
    listeners[0].close()
    refused = r"rank at 127\.0\.0\.1:\d+ cannot be reached from 127\.0\.0\.2: Connection refused"
    with pytest.raises(EngineDead, match=refused):
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


def mailboxes(library: Library, all_links: list[Links]) -> list[LinkedMailbox]:
    return [
        LinkedMailbox(library, SharedMemory(rank_sizes(SMOLLM2)), exchange_of(library, rank, links))
        for rank, links in enumerate(all_links)
    ]


def test_a_step_and_a_word_arrive_at_the_other_rank_each_once(
    library: Library, listeners: list[socket.socket]
) -> None:
    ours, theirs = mailboxes(library, connect_all(listeners[:2]))
    assert not theirs.wait(0.001)
    for step in (a_step(1, 1), a_step(4, 3), a_step(2, 8)):
        own = ours.post_step(step)
        assert theirs.wait(20.0)
        command, read = theirs.read()
        assert command == Command.STEP
        assert read is not None
        for field in fields(StepInput):
            assert np.array_equal(getattr(own, field.name), getattr(read, field.name)), field.name
        assert not theirs.wait(0.0)
    posting = threading.Timer(0.02, ours.post, [Command.WAKE])
    posting.start()
    assert theirs.wait(20.0)
    assert theirs.read() == (Command.WAKE, None)
    posting.join()


def test_a_command_that_comes_in_pieces_is_waited_for_and_half_of_one_is_the_end(
    library: Library, listeners: list[socket.socket]
) -> None:
    all_links = connect_all(listeners[:2])
    memory = SharedMemory(rank_sizes(SMOLLM2))
    theirs = LinkedMailbox(library, memory, exchange_of(library, 1, all_links[1], limit_s=0.3))
    wire = all_links[0][1]
    whole = struct.pack("<IIQi", 1, 0xFFFFFFFF, 4, Command.WAKE)
    wire.send(whole[:5])
    rest = threading.Timer(0.05, wire.send, [whole[5:]])
    rest.start()
    assert theirs.wait(0.01)
    assert theirs.read() == (Command.WAKE, None)
    rest.join()
    wire.send(struct.pack("<IIQ", 2, 0xFFFFFFFF, 4))
    with pytest.raises(EngineDead, match="a rank was lost"):
        theirs.wait(0.01)
    close(*all_links)


@pytest.mark.parametrize(
    "head", [(2, 0xFFFFFFFF, 4), (1, 0, 4), (1, 0xFFFFFFFF, 1 << 40)], ids=["number", "meeting", "size"]
)
def test_what_is_not_the_next_command_is_not_believed(
    library: Library, listeners: list[socket.socket], head: tuple[int, int, int]
) -> None:
    all_links = connect_all(listeners[:2])
    _, theirs = mailboxes(library, all_links)
    all_links[0][1].send(struct.pack("<IIQi", *head, Command.WAKE))
    with pytest.raises(EngineDead, match="a rank was lost"):
        theirs.wait(20.0)


def test_a_rank_that_takes_no_commands_is_named_and_one_that_is_gone_is_lost(
    library: Library, listeners: list[socket.socket]
) -> None:
    all_links = connect_all(listeners[:2])
    exchange = exchange_of(library, 0, all_links[0], limit_s=0.1)
    large = np.zeros(16 << 20, np.int32)  # more than sockets buffer
    with pytest.raises(EngineDead, match=r"rank 1 has not come within 0\.1 s: it hangs"):
        exchange.post_command(1, large)
    close(*all_links)
    all_links = connect_all(listeners[:2])
    _, theirs = mailboxes(library, all_links)
    close(all_links[0])
    with pytest.raises(EngineDead, match="a rank was lost"):
        theirs.wait(20.0)
