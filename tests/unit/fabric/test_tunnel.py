"""Two hosts on loopback: what one offers, processes of the other reach."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.api.framing import FRAME_HEADER_BYTES, FrameDecoder, encode_frame
from headrace.cluster_tls import client_context
from headrace.fabric import tunnel
from headrace.fabric.cluster_identity import write_identity
from headrace.fabric.tunnel import Greeting, TunnelHost, Welcome

SECRET = bytes(range(32))
LIMIT_S = 10.0


@dataclass
class Hosts:
    """`far` offers `service.sock` as `service`; `near` reaches it at `reached.sock`."""

    far: TunnelHost
    near: TunnelHost
    address: str
    directory: Path

    @property
    def reached(self) -> str:
        return str(self.directory / "reached.sock")

    @property
    def service(self) -> str:
        return str(self.directory / "service.sock")


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def two_hosts(directory: Path, secret: bytes = SECRET) -> AsyncIterator[Hosts]:
    write_identity(SECRET, directory / "far.pem")
    write_identity(secret, directory / "near.pem")
    far, near = TunnelHost(directory / "far.pem"), TunnelHost(directory / "near.pem")
    address = await far.start("127.0.0.1")
    hosts = Hosts(far, near, address, directory)
    server = await asyncio.start_unix_server(echo, hosts.service)
    try:
        async with asyncio.timeout(LIMIT_S):
            far.offer("service", hosts.service)
            await near.reach("service", hosts.reached, address)
            yield hosts
    finally:
        await near.close()
        await far.close()
        server.close()


async def ask(path: str, data: bytes) -> bytes:
    """Return what comes back for `data`; empty if the connection ends before."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(data)
        return await reader.readexactly(len(data))
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    finally:
        writer.close()


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


async def greet(hosts: Hosts, greeting: bytes) -> Welcome | None:
    """Say `greeting` to the far host with the cluster's key; None: it ended the connection."""
    context = client_context(hosts.directory / "far.pem")
    host, port = hosts.address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(greeting)
        header = await reader.readexactly(FRAME_HEADER_BYTES)
        payload = await reader.readexactly(int.from_bytes(header, "big"))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    finally:
        writer.close()
    (welcome,) = FrameDecoder[Welcome](Welcome).feed(header + payload)
    return welcome


async def test_a_process_reaches_another_hosts_socket_as_a_file_of_its_own(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        assert stat.S_IMODE(os.stat(hosts.reached).st_mode) == 0o600
        assert await ask(hosts.reached, b"hello") == b"hello"
        assert await asyncio.gather(*(ask(hosts.reached, bytes([i]) * 9) for i in range(20))) == [
            bytes([i]) * 9 for i in range(20)
        ]
        await until(lambda: hosts.near.num_open == hosts.far.num_open == 0)


async def test_megabytes_pass_unchanged_while_the_reader_is_slow(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    async with two_hosts(tmp_path) as hosts:
        reader, writer = await asyncio.open_unix_connection(hosts.reached, limit=1024)
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        writer.close()


async def test_what_was_said_before_the_end_arrives(tmp_path: Path) -> None:
    received = bytearray()
    ended = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read())
        writer.close()
        ended.set()

    async with two_hosts(tmp_path) as hosts:
        server = await asyncio.start_unix_server(listen, str(tmp_path / "last.sock"))
        hosts.far.offer("last", str(tmp_path / "last.sock"))
        await hosts.near.reach("last", str(tmp_path / "last-here.sock"), hosts.address)
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "last-here.sock"))
        writer.write(b"x" * 200_000)
        writer.close()
        await ended.wait()
        assert received == b"x" * 200_000
        server.close()


async def test_the_end_of_either_side_is_the_end_of_the_other(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        reader, writer = await asyncio.open_unix_connection(hosts.reached)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        await hosts.far.close()
        assert await reader.read(1) == b""
        writer.close()
        assert await ask(hosts.reached, b"b") == b"", "nobody is there any more"


async def test_who_has_another_secret_reaches_nothing(tmp_path: Path) -> None:
    async with two_hosts(tmp_path, secret=bytes(32)) as hosts:
        assert await ask(hosts.reached, b"hello") == b""
        assert hosts.far.num_open == 0


async def test_who_speaks_no_tls_reaches_nothing(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        host, port = hosts.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(encode_frame(Greeting("service")))
        with contextlib.suppress(ConnectionError):
            assert not (await reader.read()).endswith(encode_frame(Welcome()))
        writer.close()
        assert await ask(hosts.reached, b"hello") == b"hello"


@pytest.mark.parametrize(
    ("greeting", "word"),
    [
        (encode_frame(Greeting("service", version=99)), "version 99"),
        (encode_frame(Greeting("other")), "does not offer 'other'"),
        (encode_frame(Greeting("gone")), "gone: "),
    ],
)
async def test_a_host_says_why_it_refuses(tmp_path: Path, greeting: bytes, word: str) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.far.offer("gone", str(tmp_path / "nobody-listens.sock"))
        welcome = await greet(hosts, greeting)
        assert welcome is not None
        assert word in welcome.refusal


@pytest.mark.parametrize("greeting", [b"\xff\xff\xff\xff", b"\0\0\0\3abc", encode_frame(Welcome())])
async def test_nonsense_from_a_host_ends_its_connection_alone(tmp_path: Path, greeting: bytes) -> None:
    async with two_hosts(tmp_path) as hosts:
        assert await greet(hosts, greeting) is None
        assert await ask(hosts.reached, b"hello") == b"hello"


async def test_a_silent_host_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "CONNECT_LIMIT_S", 0.1)
    async with two_hosts(tmp_path) as hosts:
        assert await greet(hosts, b"") is None


async def test_a_name_that_moved_is_reached_at_its_new_address(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        reader, writer = await asyncio.open_unix_connection(hosts.reached)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        other = TunnelHost(tmp_path / "far.pem")
        address = await other.start("127.0.0.1")
        other.offer("service", hosts.service)
        await hosts.near.reach("service", hosts.reached, address)
        assert await reader.read(1) == b"", "what went to the old place is cut"
        writer.close()
        assert await ask(hosts.reached, b"b") == b"b"
        await until(lambda: hosts.far.num_open == 0)
        await other.close()


async def test_what_is_forgotten_is_neither_offered_nor_reached(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        reader, writer = await asyncio.open_unix_connection(hosts.reached)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        hosts.near.forget("service")
        assert await reader.read(1) == b""
        writer.close()
        assert hosts.reached not in map(str, hosts.directory.iterdir())
        hosts.far.forget("service")
        welcome = await greet(hosts, encode_frame(Greeting("service")))
        assert welcome is not None
        assert "does not offer" in welcome.refusal


async def test_connections_beyond_the_bound_are_closed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_hosts(tmp_path) as hosts:
        reader, writer = await asyncio.open_unix_connection(hosts.reached)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        monkeypatch.setattr(tunnel, "MAX_TUNNELS", 1)
        assert await ask(hosts.reached, b"b") == b""
        writer.write(b"c")
        assert await reader.read(1) == b"c"
        writer.close()


async def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as hosts:
        with pytest.raises(ValueError, match="host:port"):
            await hosts.near.reach("x", str(tmp_path / "x.sock"), "nowhere")
