"""Tunnels between hosts: a process reaches a socket of another host as if it were a file of its own.

    process ── /run/x.sock (mode 0600) ── TunnelHost ══ mutual TLS ══ TunnelHost ── /run/x.sock ── process
               `reach`                                                `offer`

Owns the connections between hosts, who may make them, and their ends: a host that is gone closes what went
through it within seconds, which is what processes on one machine see when the other side dies.
Must not know what the bytes mean. Nothing of a request's or a token's way is here (HAProxy goes to fronts by
itself), except for streams in a sibling's engine: one message per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.api.framing import FRAME_HEADER_BYTES, FrameDecoder, encode_frame
from headrace.api.messages import Message
from headrace.api.notation import split_address
from headrace.cluster_tls import client_context, server_context
from headrace.errors import ProtocolError, text_of
from headrace.private_socket import bind_private_socket

TUNNEL_VERSION = 1
MAX_TUNNELS = 4096
"""Most connections that go through one host at a time; each costs two descriptors and its buffers."""
CONNECT_LIMIT_S = 5.0
"""For each of: the connection, its handshake, the other side's word."""
MAX_GREETING_BYTES = 4096
FLUSH_LIMIT_S = 2.0
"""For what was read from one side to reach the other after the first has ended."""
CHUNK_BYTES = 65_536
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 2, 1, 3
SILENCE_LIMIT_MS = 5000
"""A host that says nothing for five seconds is gone, with or without bytes under way."""
_log = logging.getLogger(__name__)


class Greeting(Message, frozen=True):
    """The first frame of whoever connects."""

    name: str
    """Of the socket that is wanted."""
    version: int = TUNNEL_VERSION


class Welcome(Message, frozen=True):
    """The answer; after it there are only the processes' own bytes."""

    refusal: str = ""
    """Empty: connected."""
    version: int = TUNNEL_VERSION


@dataclass(slots=True)
class _Reached:
    """A socket of another host that processes of this one find at `socket_path`."""

    socket_path: str
    address: str
    server: asyncio.Server | None = None
    inode: int = 0
    """Of the socket's file: a process may have put its own there since."""


class TunnelHost:
    """One host's end of all tunnels: what it offers, and what it reaches. Of one event loop."""

    def __init__(self, identity: Path) -> None:
        """identity: PEM file (`cluster_identity.write_identity`). Raises ConfigError."""
        self._server_tls = server_context(identity)
        self._client_tls = client_context(identity)
        self._server: asyncio.Server | None = None
        self._offers: dict[str, str] = {}
        self._reached: dict[str, _Reached] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        """Each connection's task, and the name that it asked for; empty: not known yet."""

    def __repr__(self) -> str:
        return f"TunnelHost({len(self._offers)} offered, {len(self._reached)} reached, {self.num_open} open)"

    @property
    def num_open(self) -> int:
        """Connections through this host, those being made included."""
        return len(self._tasks)

    async def start(self, bind_host: str, port: int = 0) -> str:
        """Listen on one of this host's addresses; return host:port. Raises OSError."""
        self._server = await asyncio.start_server(
            lambda reader, writer: self._guard(self._take_in(reader, writer), writer),
            bind_host,
            port,
            ssl=self._server_tls,
            ssl_handshake_timeout=CONNECT_LIMIT_S,
        )
        name = self._server.sockets[0].getsockname()
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"

    def offer(self, name: str, socket_path: str) -> None:
        """Let other hosts reach `socket_path` of this host as `name`."""
        self._offers[name] = socket_path

    async def reach(self, name: str, socket_path: str, address: str) -> None:
        """Have `socket_path` here stand for what the host at `address` offers as `name`.

        Again with another address: it moved; what went to the old address is cut. Raises ValueError for an
        address that is none, OSError if the socket cannot be made.
        """
        split_address(address)
        known = self._reached.get(name)
        if known is not None and (known.socket_path, known.address) == (socket_path, address):
            return
        if known is not None:
            self._cut(name)
        if known is not None and known.socket_path == socket_path:
            known.address = address
            return
        if known is not None:
            self._close_socket(known)
        reached = self._reached[name] = _Reached(socket_path, address)
        listener = bind_private_socket(socket_path)
        try:
            reached.inode = os.stat(socket_path).st_ino
            reached.server = await asyncio.start_unix_server(
                lambda reader, writer: self._guard(self._carry_out(name, reached, reader, writer), writer),
                sock=listener,
            )
        except BaseException:
            listener.close()
            self._reached.pop(name, None)
            raise
        if self._reached.get(name) is not reached:  # it was forgotten meanwhile
            self._close_socket(reached)

    def forget(self, name: str) -> None:
        """Offer and reach `name` no more; what goes through it is cut."""
        self._offers.pop(name, None)
        if (reached := self._reached.pop(name, None)) is not None:
            self._close_socket(reached)
        self._cut(name)

    async def close(self) -> None:
        """End everything."""
        if self._server is not None:
            self._server.close()
        for name in [*self._offers, *self._reached]:
            self.forget(name)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CONNECT_LIMIT_S)

    # ---- connections ----------------

    async def _guard(self, connection: Coroutine[object, object, None], writer: asyncio.StreamWriter) -> None:
        """Run one connection to its end. Whatever goes wrong ends that one alone, and both its sides."""
        task = asyncio.current_task()
        assert task is not None
        if self.num_open >= MAX_TUNNELS:
            connection.close()
            _log.warning("tunnel: %d connections are open, which is all that it takes", self.num_open)
            writer.transport.abort()
            return
        self._tasks[task] = ""
        try:
            await connection
        except (OSError, TimeoutError, ProtocolError, asyncio.IncompleteReadError) as error:
            _log.info("tunnel: %s", text_of(error))
        except asyncio.CancelledError:
            pass  # cut, by `forget`, `reach` or `close`; nobody else knows this task
        finally:
            del self._tasks[task]
            writer.transport.abort()

    async def _take_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Another host, which has shown the cluster's key already, wants one of our sockets."""
        _notice_silence(writer)
        greeting: Greeting = await _read_frame(reader, Greeting)
        self._name(greeting.name)
        path = self._offers.get(greeting.name)
        if greeting.version != TUNNEL_VERSION:
            theirs = greeting.version
            refusal = f"it speaks version {theirs} of tunnels, this host {TUNNEL_VERSION}: run one release"
            await _refuse(writer, refusal)
        elif path is None:
            await _refuse(writer, f"this host does not offer {greeting.name[:100]!r}")
        else:
            try:
                async with asyncio.timeout(CONNECT_LIMIT_S):
                    near = await asyncio.open_unix_connection(path)
            except OSError as error:  # TimeoutError is one
                await _refuse(writer, f"{greeting.name}: {error.strerror or type(error).__name__}")
                return
            writer.write(encode_frame(Welcome()))
            await _carry((reader, writer), near)

    async def _carry_out(
        self, name: str, reached: _Reached, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A process of ours wants another host's socket."""
        self._name(name)
        where = f"{name} at {reached.address}"
        host, port = split_address(reached.address)
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                far = await asyncio.open_connection(
                    host, port, ssl=self._client_tls, ssl_handshake_timeout=CONNECT_LIMIT_S
                )
        except OSError as error:
            raise ConnectionError(f"{where}: {text_of(error)}") from error
        try:
            _notice_silence(far[1])
            far[1].write(encode_frame(Greeting(name)))
            welcome: Welcome = await _read_frame(far[0], Welcome)
            if welcome.refusal:
                raise ConnectionError(f"{where}: {welcome.refusal}")
            await _carry((reader, writer), far)
        finally:
            far[1].transport.abort()

    def _name(self, name: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = name

    def _cut(self, name: str) -> None:
        for task, wanted in self._tasks.items():
            if wanted == name:
                task.cancel()

    def _close_socket(self, reached: _Reached) -> None:
        if reached.server is not None:
            reached.server.close()
        with contextlib.suppress(OSError):
            if os.stat(reached.socket_path).st_ino == reached.inode:
                os.unlink(reached.socket_path)


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _carry(one: _Streams, other: _Streams) -> None:
    """Carry bytes both ways until either side ends, then end both. What was read is delivered first."""
    ways = [asyncio.create_task(_pump(one[0], other[1])), asyncio.create_task(_pump(other[0], one[1]))]
    try:
        done, others = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in others:
            way.cancel()
        for _, writer in (one, other):
            writer.close()
        async with asyncio.timeout(FLUSH_LIMIT_S):
            for _, writer in (one, other):
                await writer.wait_closed()
        for way in done:
            way.result()
    finally:
        for way in ways:
            way.cancel()
        for _, writer in (one, other):
            writer.transport.abort()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes one way until their end. A side that does not read holds the other back, as sockets do."""
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()


async def _refuse(writer: asyncio.StreamWriter, refusal: str) -> None:
    _log.info("tunnel: refused: %s", refusal)
    writer.write(encode_frame(Welcome(refusal)))
    writer.close()
    async with asyncio.timeout(FLUSH_LIMIT_S):
        await writer.wait_closed()


async def _read_frame(reader: asyncio.StreamReader, kind: type[Message]) -> Any:
    """Read one frame. Raises ProtocolError, IncompleteReadError and TimeoutError."""
    async with asyncio.timeout(CONNECT_LIMIT_S):
        header = await reader.readexactly(FRAME_HEADER_BYTES)
        length = int.from_bytes(header, "big")
        if length > MAX_GREETING_BYTES:
            raise ProtocolError(f"a greeting of {length} bytes; at most {MAX_GREETING_BYTES} are allowed")
        payload = await reader.readexactly(length)
    (message,) = FrameDecoder[Message](kind).feed(header + payload)
    return message


def _notice_silence(writer: asyncio.StreamWriter) -> None:
    """Have the kernel end the connection when the other host says nothing any more (tcp(7))."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, SILENCE_LIMIT_MS),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
