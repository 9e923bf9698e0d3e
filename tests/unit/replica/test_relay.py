"""The relay in this process, between a client and an upstream that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.api.messages import RelaySpec
from headrace.clock import SystemClock
from headrace.errors import InvalidRequest
from headrace.private_socket import bind_private_socket
from headrace.replica import relay_passes, waiting_answer
from headrace.replica.relay import Relay, main
from headrace.replica.relay_connection import find_model, head_again

Upstream = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
LIMIT_S = 5.0


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"messages": [{"model": "inner"}], "model": "chat"}', "chat"),
        (b'{"model": "first", "model": "last"}', "last"),
        (b'{"mod\\u0065l": "caf\\u00e9"}', "café"),
    ],
)
def test_the_model_is_the_last_top_level_field_of_that_name(body: bytes, model: str) -> None:
    assert find_model(bytearray(body)) == model


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"a":' + b"[" * 100_000, "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b"{}", "model_required"),
        (b"[]", "model_required"),
        (b'{"model": 1}', "model_required"),
        (b'{"model": null}', "model_required"),
    ],
)
def test_a_body_without_a_model_says_what_to_do(body: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find_model(body)
    assert caught.value.code == code


def test_the_second_head_carries_the_model_safely_and_one_length() -> None:
    headers = [
        ("host", "x"),
        ("transfer-encoding", "chunked"),
        ("connection", "x-headrace-tenant"),
        ("x-headrace-model", "forged"),
        ("x-headrace-tenant", "acme"),
    ]
    head = head_again("POST", "/v1/completions", headers, "a/b\r\nx: y é" + "z" * 500, 12)
    lines = head.decode().split("\r\n")
    assert lines[:3] == ["POST /v1/completions HTTP/1.1", "host: x", "x-headrace-tenant: acme"]
    assert lines[3].startswith("x-headrace-model: a%2Fb%0D%0Ax%3A%20y%20%C3%A9zzz")
    assert len(lines[3]) < 300
    assert lines[4:] == ["content-length: 12", "connection: close", "x-headrace-pass: "]


async def wait_for(condition: Callable[[], object], what: str) -> None:
    end_s = asyncio.get_running_loop().time() + LIMIT_S
    while not condition():
        assert asyncio.get_running_loop().time() < end_s, f"still not: {what}"
        await asyncio.sleep(0.005)


class Rig:
    """A running relay; `upstream` plays HAProxy's internal listener."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.received: list[bytes] = []
        self.relay: Relay | None = None

    async def wait_until_it_holds(self, num_requests: int, num_bytes: int) -> None:
        wanted = f"<Relay {num_requests} requests, {num_bytes} bytes>"
        await wait_for(lambda: repr(self.relay) == wanted, wanted)

    async def exchange(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self.directory / "relay.sock"))
        try:
            writer.write(data)
            async with asyncio.timeout(LIMIT_S):
                return await reader.read()
        finally:
            writer.transport.abort()

    async def serve_ok(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        self.received.append(head + await reader.readexactly(size))
        writer.write(ANSWER)
        writer.close()


@contextlib.asynccontextmanager
async def running_relay(
    directory: Path, upstream: Upstream | None = None, **limits: Any
) -> AsyncIterator[Rig]:
    rig = Rig(directory)
    path = str(directory / "internal.sock")
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future((upstream or rig.serve_ok)(reader, writer))
        tasks.add(task)
        task.add_done_callback(lambda done: writer.close())

    server = await asyncio.start_unix_server(accept, path, limit=1 << 20)
    spec = RelaySpec(str(directory / "relay.sock"), **{"upstream_socket": path, **limits})
    stop = asyncio.Event()
    rig.relay = relay = Relay(spec, SystemClock())
    running = asyncio.create_task(relay.run(stop))
    await wait_for(Path(spec.socket).exists, "the relay listens")
    try:
        yield rig
        stop.set()
        async with asyncio.timeout(LIMIT_S):
            await running
        assert "relay.sock" not in os.listdir(directory)
        assert repr(relay) == "<Relay 0 requests, 0 bytes>", "all is given back"
    finally:
        running.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.close()
        await asyncio.sleep(0)


def post(body: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def status_and_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"]["code"]


async def test_a_request_is_sent_again_with_its_model_and_answered(tmp_path: Path) -> None:
    async with running_relay(tmp_path) as rig:
        assert stat.S_IMODE((tmp_path / "relay.sock").stat().st_mode) == 0o600
        body = json.dumps({"prompt": "x" * 600_000, "model": "a/b"}).encode()
        assert await rig.exchange(post(body)) == ANSWER
        assert b"\r\nx-headrace-model: a%2Fb\r\n" in rig.received[0]
        assert rig.received[0].endswith(body)
        # Trailers are not headers: nothing in them reaches the second pass.
        chunked = b"%x\r\n%b\r\n0\r\nx-headrace-tenant: rich\r\n\r\n" % (len(body), body)
        head = b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
        assert await rig.exchange(head + chunked) == ANSWER
        assert b"rich" not in rig.received[1]
        assert b'"status":"ok"' in await rig.exchange(b"GET /health HTTP/1.1\r\n\r\n")


@pytest.mark.slow
async def test_limits_of_one_body_and_of_all_together_are_kept(tmp_path: Path) -> None:
    async with running_relay(tmp_path, max_body_bytes=1000, max_total_bytes=1500) as rig:
        assert status_and_code(await rig.exchange(post(b"x" * 1001))) == (413, "payload_too_large")
        head = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
        pieces = b"1f4\r\n" + b"x" * 500 + b"\r\n"
        assert status_and_code(await rig.exchange(head + pieces * 3)) == (413, "payload_too_large")
        path = str(tmp_path / "relay.sock")
        _, holding = await asyncio.open_unix_connection(path)
        holding.write(post(b"x" * 1000)[:-1])
        await rig.wait_until_it_holds(1, 999)
        assert status_and_code(await rig.exchange(post(b"x" * 900))) == (503, "overloaded")
        holding.transport.abort()
        await rig.wait_until_it_holds(0, 0)
        assert status_and_code(await rig.exchange(post(b"{" * 900))) == (400, "invalid_json")


@pytest.mark.slow
async def test_a_slow_body_is_told_so_and_a_slow_head_is_dropped(tmp_path: Path) -> None:
    async with running_relay(tmp_path, body_idle_timeout_s=0.2) as rig:
        assert status_and_code(await rig.exchange(post(b"xx")[:-1])) == (408, "request_timeout")
    async with running_relay(tmp_path, body_timeout_s=0.6) as rig:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "relay.sock"))
        writer.write(post(b"x" * 500)[:-500])
        answer = asyncio.create_task(reader.read())
        for _ in range(40):  # never silent for long, and yet never done
            if answer.done():
                break
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert status_and_code(await answer) == (408, "request_timeout")
        writer.transport.abort()


@pytest.mark.slow
async def test_an_upstream_that_refuses_closes_or_says_nothing_is_told(tmp_path: Path) -> None:
    body = json.dumps({"prompt": "x" * 3_000_000, "model": "chat"}).encode()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")  # the body is not read at all
        writer.write(b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(30)

    async with running_relay(tmp_path, refuse) as rig:
        assert (await rig.exchange(post(body))).startswith(b"HTTP/1.1 503 X")
    async with running_relay(tmp_path, close) as rig:
        assert status_and_code(await rig.exchange(post(body))) == (502, "replica_lost")
    async with running_relay(tmp_path, hang, answer_timeout_s=0.3) as rig:
        assert await rig.exchange(post(body)) == b""
    async with running_relay(tmp_path) as rig:
        (tmp_path / "internal.sock").unlink()
        assert status_and_code(await rig.exchange(post(body))) == (503, "overloaded")


@pytest.mark.slow
async def test_a_refusal_is_passed_on_whichever_part_of_the_body_it_cut(tmp_path: Path) -> None:
    """HAProxy refuses what it does not know and closes at once: the rest of the body meets a closed pipe."""
    listener = bind_private_socket(str(tmp_path / "refusing.sock"))
    listener.setblocking(True)
    listener.listen(64)
    num_read = itertools.cycle((10, 200, 70_000, 250_000, 300_000, 500_000))

    def refuse() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(LIMIT_S)
                left = next(num_read)
                while left > 0:
                    left -= len(connection.recv(left)) or left
                connection.sendall(ANSWER)

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    body = json.dumps({"model": "chat", "prompt": "x" * 1_000_000}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with running_relay(tmp_path, upstream_socket=str(tmp_path / "refusing.sock")) as rig:
        for number in range(60):
            assert await rig.exchange(request) == ANSWER, number
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


async def test_a_client_that_reads_nothing_stops_the_upstream(tmp_path: Path) -> None:
    num_sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            while num_sent < 200:
                writer.write(b"x" * 65_536)
                await writer.drain()
                num_sent += 1

    async with running_relay(tmp_path, pour):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "relay.sock"), limit=1024)
        writer.write(post(b'{"model":"chat"}'))
        await asyncio.sleep(0.1)
        before = -1
        while before != num_sent:
            before = num_sent
            await asyncio.sleep(0.1)
        assert 0 < num_sent < 60, "13 MB would be no backpressure"
        async with asyncio.timeout(LIMIT_S):
            data = await reader.readexactly(200 * 65_536)
        assert len(data) == 200 * 65_536
        writer.transport.abort()


@pytest.mark.slow
async def test_an_open_request_is_finished_after_the_word_to_stop(tmp_path: Path) -> None:
    is_asked, may_answer = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        is_asked.set()
        await may_answer.wait()
        writer.write(ANSWER)
        await writer.drain()

    async with running_relay(tmp_path, wait) as rig:
        answer = asyncio.create_task(rig.exchange(post(b'{"model":"chat"}')))
        await is_asked.wait()
        asyncio.get_running_loop().call_later(0.3, may_answer.set)
    assert await answer == ANSWER


def waiting_post() -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-headrace-wait: 20.0\r\nx-headrace-model: chat\r\n"
    return head + b"content-length: 4\r\n\r\nbody"


async def test_a_stream_that_fronts_refuse_is_sent_again_in_passes_of_its_own_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_passes, "AGAIN_S", 0.001)
    monkeypatch.setattr(waiting_answer, "COMMENT_EVERY_S", 0.0)
    names: list[bytes] = []

    async def refuse_thrice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(4) == b"body"
        names.append(head.partition(b"x-headrace-pass: ")[2].split(b"\r\n")[0])
        if len(names) < 4:
            writer.write(b"HTTP/1.1 503 X\r\nx-headrace-again: refu")
            await writer.drain()
            writer.write(b"sed\r\ncontent-length: 7\r\n\r\nleaving")
        else:
            await asyncio.sleep(0.6)  # two sweeps: the client is told that it waits
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\ndata: word\n\n")
        await writer.drain()

    async with running_relay(tmp_path, refuse_thrice) as rig:
        answer = await rig.exchange(waiting_post())
    assert names == [b"2", b"3", b"4", b"5"]
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"data: word\n\n\r\n0\r\n\r\n")
    assert b"leaving" not in answer
    assert answer.count(b": waiting for a replica") >= 2


async def test_the_last_pass_says_so_and_its_refusal_is_one_error_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_passes, "AGAIN_S", 0.001)
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        again = b"" if b"x-headrace-pass: last\r\n" in heads[-1] else b"x-headrace-again: refused\r\n"
        writer.write(b'HTTP/1.1 503 X\r\n%bcontent-length: 13\r\n\r\n{"error": {}}' % again)
        await writer.drain()

    async with running_relay(tmp_path, refuse) as rig:
        answer = await rig.exchange(waiting_post())
    assert len(heads) == relay_passes.MAX_REFUSED + 1
    assert answer.endswith(b'data: {"error": {}}\n\n\r\n0\r\n\r\n')
    assert answer.count(b"data: ") == 1


async def test_a_client_that_leaves_between_two_passes_ends_them(tmp_path: Path) -> None:
    num_passes = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_passes
        await reader.readuntil(b"\r\n\r\n")
        num_passes += 1
        writer.write(b"HTTP/1.1 503 X\r\nx-headrace-again: refused\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async with running_relay(tmp_path, refuse) as rig:
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "relay.sock"))
        writer.write(waiting_post())
        await wait_for(lambda: num_passes == 1, "the first pass is refused")
        writer.transport.abort()
        await rig.wait_until_it_holds(0, 0)
        assert num_passes == 1


def test_wrong_arguments_end_the_process_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["{}"]) == 2
    assert "RelaySpec" in capsys.readouterr().err
