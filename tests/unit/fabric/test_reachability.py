"""Who answers: one that takes connections, one that refuses them; not one that says nothing."""

from __future__ import annotations

import asyncio
import socket

from headrace.fabric.reachability import answers

LIMIT_S = 5.0


async def test_one_that_listens_answers_and_so_does_one_that_refuses() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await answers(f"127.0.0.1:{port}", LIMIT_S)
    assert await answers(f"127.0.0.1:{port}", LIMIT_S), "its kernel says that nobody listens"


async def test_one_that_says_nothing_does_not_answer() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:  # its queue is full, and the kernel drops who comes next
            each.setblocking(False)
            each.connect_ex(address)
        assert not await answers(f"127.0.0.1:{address[1]}", 0.1)
        for each in waiting:
            each.close()


async def test_what_is_no_address_does_not_answer() -> None:
    assert not await answers("", LIMIT_S)
    assert not await answers("127.0.0.1:many", LIMIT_S)
