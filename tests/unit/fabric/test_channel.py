"""Channels: what is said arrives whole; who talks nonsense or does not read is cut off."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from headrace.api.messages import LauncherCommand, ListProcesses, StopProcess
from headrace.fabric import channel as channel_module
from headrace.fabric.channel import Channel, connect, listen


class Listener:
    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue(100)
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.channels: list[Channel] = []

    def make(self) -> Channel:
        channel = Channel(
            LauncherCommand,
            lambda channel, message: self.messages.put_nowait(message),
            lambda channel, reason: self.closed.done() or self.closed.set_result(reason),
        )
        self.channels.append(channel)
        return channel


async def test_messages_arrive_in_order_and_the_socket_is_private(tmp_path: Path) -> None:
    listener = Listener()
    path = str(tmp_path / "a.sock")
    server = await listen(path, listener.make)
    assert os.stat(path).st_mode & 0o777 == 0o600
    client = Channel(LauncherCommand, lambda c, m: None, lambda c, r: None)
    await connect(path, client, 1.0)
    client.send(StopProcess("a", 1.0))
    client.send(ListProcesses())
    assert await listener.messages.get() == StopProcess("a", 1.0)
    assert await listener.messages.get() == ListProcesses()
    client.close()
    client.send(ListProcesses())  # nobody is there any more: nothing happens
    await asyncio.wait_for(listener.closed, 1.0)
    server.close()


async def test_nonsense_closes_the_connection_with_a_reason(tmp_path: Path) -> None:
    listener = Listener()
    path = str(tmp_path / "a.sock")
    server = await listen(path, listener.make)
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"\x00\x00\x00\x03abc")
    assert await asyncio.wait_for(reader.read(), 1.0) == b""
    assert "not a message" in await asyncio.wait_for(listener.closed, 1.0)
    writer.close()
    server.close()


async def test_a_peer_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_BUFFERED_BYTES", 100_000)
    listener = Listener()
    path = str(tmp_path / "a.sock")
    server = await listen(path, listener.make)
    _, writer = await asyncio.open_unix_connection(path, limit=1)
    writer.write(b"")
    while not listener.channels or not listener.channels[0].is_open:  # noqa: ASYNC110, one turn of the loop
        await asyncio.sleep(0)
    for _ in range(20):
        listener.channels[0].send(StopProcess("x" * 100_000, 1.0))
    assert "does not read" in await asyncio.wait_for(listener.closed, 1.0)
    writer.close()
    server.close()


async def test_a_stale_socket_is_replaced_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    (await listen(path, Listener().make)).close()
    server = await listen(path, Listener().make)
    server.close()
    with pytest.raises(OSError):
        await connect(str(tmp_path / "b.sock"), Listener().make(), 1.0)
