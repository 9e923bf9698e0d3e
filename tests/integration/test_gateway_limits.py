"""What one client may take: a real HAProxy and router, mock fronts. docs/reference/limits.md lists these."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from tests.integration.gateway_rig import Client, Gateway, HttpAnswer, running_gateway

pytestmark = pytest.mark.slow
LIMIT_S = 10.0
BODY = b'{"model":"chat"}'


async def told(client: Client) -> HttpAnswer:
    async with asyncio.timeout(LIMIT_S):
        return await client.receive()


async def is_rejected(gateway: Gateway) -> bool:
    """Whether a new connection is closed without a word: at once, or as soon as it is there."""
    try:
        client = await gateway.connect()
        async with asyncio.timeout(LIMIT_S):
            return await client.reader.read() == b""
    except ConnectionResetError:
        return True


async def until_served(gateway: Gateway) -> None:
    end_s = asyncio.get_running_loop().time() + LIMIT_S
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if (await gateway.chat()).status == 200:
                return
        assert asyncio.get_running_loop().time() < end_s, "there is still no room for a connection"
        await asyncio.sleep(0.01)


async def test_one_address_takes_its_share_of_connections_and_no_more() -> None:
    async with running_gateway(max_connections_per_address=3) as gateway:
        await gateway.add_front("chat-1")
        await until_served(gateway)  # the rig's own connection counts until it is closed
        streams = [await gateway.connect() for _ in range(3)]
        for client in streams:
            body = json.dumps({"model": "chat", "mock": {"events": 100, "gap_s": 0.02}}).encode()
            client.send("POST", "/v1/completions", body)
            assert (await client.receive_head()).status == 200
        refused = await gateway.connect()
        refused.send("POST", "/v1/completions", BODY)
        answer = await told(refused)
        assert (answer.status, answer.error()["code"]) == (429, "too_many_connections")
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
        idle = [await gateway.connect() for _ in range(3)]
        assert await is_rejected(gateway), "from twice the limit on nothing is answered"
        for client in (*idle, refused, streams.pop()):
            client.close()
        await until_served(gateway)


async def test_without_a_limit_of_its_own_an_address_may_take_many() -> None:
    async with running_gateway() as gateway:
        clients = [await gateway.connect() for _ in range(100)]
        for client in clients:
            client.send("GET", "/health")
        assert {(await told(client)).status for client in clients} == {200}


async def test_slow_heads_and_slow_bodies_are_told_so() -> None:
    edits = {"timeout http-request 10s": "timeout http-request 300ms", "time 30s": "time 300ms"}
    async with running_gateway(config_edits=edits) as gateway:
        head, drip, body = [await gateway.connect() for _ in range(3)]
        head.writer.write(b"POST /v1/comp")
        body.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        dripping = asyncio.create_task(drip_header(drip))
        answer = await told(body)
        assert (answer.status, answer.error()["code"]) == (408, "request_timeout")
        for client in (head, drip):
            assert (
                await client.receive_head()
            ).status == 408  # before a request is understood: HAProxy's own
            assert b"408" in await client.reader.read()
        await dripping


async def drip_header(client: Client) -> None:
    """Send a header byte by byte, never silent, never done."""
    client.writer.write(b"GET /health HTTP/1.1\r\nx: ")
    for _ in range(30):
        if client.writer.transport.is_closing():
            return
        client.writer.write(b"y")
        await asyncio.sleep(0.03)


TOO_LONG: list[tuple[str, str, dict[str, str], int, str]] = [
    ("GET", "/v1/models/" + "x" * 9000, {}, 414, "uri_too_long"),
    ("POST", "/v1/completions?" + "x" * 9000, {}, 414, "uri_too_long"),
    ("GET", "/health", {"x-long": "y" * 40_000}, 413, "payload_too_large"),
    ("GET", "/health", {f"x-{number}": "y" * 400 for number in range(90)}, 413, "payload_too_large"),
    ("X" * 5000, "/health", {}, 405, "method_not_allowed"),
    ("GET", "/" + "x" * 5000, {}, 404, "not_found"),
    ("GET", "/v1/models/" + "x" * 5000, {}, 404, "model_not_found"),
]


async def test_what_is_too_long_is_told_so_in_openais_shape(gateway: Gateway) -> None:
    for method, path, headers, status, code in TOO_LONG:
        answer = await gateway.request(method, path, b"", headers)
        assert (answer.status, answer.error()["code"]) == (status, code), answer.body
        assert len(answer.body) < 2000, "what was sent is not sent back whole"


async def test_more_headers_than_haproxy_takes_get_its_own_page(gateway: Gateway) -> None:
    answer = await gateway.request("GET", "/health", b"", {f"x-{number}": "y" for number in range(90)})
    assert answer.status == 200
    client = await gateway.connect()
    client.send("GET", "/health", b"", {f"x-{number}": "y" for number in range(150)})
    assert (await client.receive_head()).status == 400


async def test_a_model_name_of_any_length_is_answered_with_its_beginning(gateway: Gateway) -> None:
    for size in (129, 10_000, 60_000):
        body = json.dumps({"model": "m" * size}).encode()
        answer = await gateway.request("POST", "/v1/completions", body)
        assert (answer.status, answer.error()["code"]) == (404, "model_not_found")
        assert "m" * 128 in answer.error()["message"]
        assert "m" * 129 not in answer.error()["message"]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as gateway:
        yield gateway
