"""Short streams between a real HAProxy and real fronts go over HTTP/2, all others over HTTP/1.1; clients see
no difference, and none of them can stall another."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from tests.integration.front_process import SIMULATED, RunningFront, check_conservation, running_front
from tests.integration.gateway_rig import Client, Gateway, HttpAnswer, running_gateway, wait_for

from headrace.api.messages import EngineSpec
from headrace.gateway.names import backend_name
from headrace.gateway.paths import GatewayPaths
from headrace.policy.answer_size import MAX_SHORT_TOKENS

pytestmark = pytest.mark.slow

SLOW = EngineSpec("simulated", "simulated", simulated_step_s=0.02, max_running=512)
SHORT, LONG = 24, MAX_SHORT_TOKENS + 1


def body_of(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "Count: one two three"}]
    chosen = {"model": "chat", "messages": messages, "stream": True, "max_tokens": SHORT, "seed": 7}
    return json.dumps({**chosen, **fields}).encode()


@contextmanager
def fronts(gateway: Gateway, number: int = 1, **spec: Any) -> Iterator[list[RunningFront]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                running_front(
                    spec.get("engine", SIMULATED),
                    gateway_dir=gateway.run_dir,
                    replica_id=f"chat-{index + 1}",
                    max_open=512,
                )
            )
            for index in range(number)
        ]


async def until_serving(gateway: Gateway, number: int = 1) -> None:
    for index in range(number):
        await wait_for(lambda index=index: gateway.is_serving(f"chat-{index + 1}"), "the front serves")

    async def has_shared() -> bool:
        servers = await show_servers(gateway)
        return all(servers.get(f"chat-{index + 1}_h2", ("", 0))[0] == "UP" for index in range(number))

    if gateway.spec.replica_protocol == "h2":
        await until(has_shared)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll what HAProxy says of itself, for 10 s."""
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def show_servers(gateway: Gateway) -> dict[str, tuple[str, int]]:
    """Return {server: (status, requests so far)} of the endpoint; those on HTTP/2 end in `_h2`."""
    reader, writer = await asyncio.open_unix_connection(GatewayPaths(gateway.run_dir).runtime_socket)
    writer.write(b"show stat\n")
    lines = (await reader.read()).decode().splitlines()
    writer.close()
    names = lines[0].lstrip("# ").split(",")
    rows = [dict(zip(names, line.split(","), strict=False)) for line in lines[1:]]
    suffixes = {backend_name("chat"): "", backend_name("chat", is_shared=True): "_h2"}
    members = [row for row in rows if row.get("pxname") in suffixes and row["svname"] != "BACKEND"]
    return {
        row["svname"] + suffixes[row["pxname"]]: (row["status"].split()[0], int(row["stot"]))
        for row in members
    }


def without_ids(body: bytes) -> bytes:
    return re.sub(rb'"(id|created)":("[^"]*"|\d+)', rb'"\1":0', body)


async def ask(gateway: Gateway, body: bytes, path: str = "/v1/chat/completions") -> HttpAnswer:
    return await gateway.request("POST", path, body)


REQUESTS: list[tuple[str, bytes]] = [
    ("/v1/chat/completions", body_of()),
    ("/v1/chat/completions", body_of(n=3, stream_options={"include_usage": True})),
    ("/v1/chat/completions", body_of(stop=["never there"])),
    (
        "/v1/completions",
        json.dumps({"model": "chat", "prompt": "a b", "stream": True, "max_tokens": 5}).encode(),
    ),
    ("/v1/chat/completions", body_of(stream=False)),
    ("/v1/chat/completions", body_of(max_tokens=0)),
    ("/v1/chat/completions", body_of(messages=[])),
    ("/v1/chat/completions", body_of(temperature=9)),
    ("/v1/chat/completions", body_of(tools=[{"type": "function"}])),
    ("/tokenize", json.dumps({"model": "chat", "prompt": "a b c", "stream": True, "max_tokens": 1}).encode()),
]


async def test_clients_see_the_same_bytes_over_both_protocols() -> None:
    answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
    for protocol in ("h2", "http1"):
        async with running_gateway(replica_protocol=protocol) as gateway:
            with fronts(gateway) as (front,):
                await until_serving(gateway)
                got = [await ask(gateway, body, path) for path, body in REQUESTS]
                answers[protocol] = [
                    (
                        answer.status,
                        {k: v for k, v in answer.headers.items() if k not in ("date", "x-request-id")},
                        without_ids(answer.body),
                    )
                    for answer in got
                ]
                servers = await show_servers(gateway)
                assert ("chat-1_h2" in servers) == (protocol == "h2")
                assert servers["chat-1"][1] >= (1 if protocol == "h2" else len(REQUESTS))
                if protocol == "h2":
                    assert servers["chat-1_h2"][1] >= 4, servers
                check_conservation(front)
    for number, (over_h2, over_http1) in enumerate(zip(answers["h2"], answers["http1"], strict=True)):
        assert over_h2[:2] == over_http1[:2], f"request {number}"
        # Several choices may take their turns in different steps; each one's events keep their order.
        for index in range(3):
            events = [
                [event for event in body.split(b"\n\n") if b'"index":%d' % index in event]
                for body in (over_h2[2], over_http1[2])
            ]
            assert events[0] == events[1], f"request {number}, choice {index}"
        assert sorted(over_h2[2].split(b"\n\n")) == sorted(over_http1[2].split(b"\n\n")), f"request {number}"
    assert answers["h2"][0][2].endswith(b"data: [DONE]\n\n")


async def test_what_is_not_certainly_short_stays_on_http_1_1() -> None:
    async with running_gateway() as gateway:
        with fronts(gateway):
            await until_serving(gateway)
            long_prompt = [{"role": "user", "content": "x " * 20_000}]
            for fields in (
                {"stream": False},
                {"max_tokens": LONG},
                {"max_tokens": MAX_SHORT_TOKENS, "n": 2},
                {"logprobs": True},
                {"messages": long_prompt},
            ):
                before = await show_servers(gateway)
                answer = await ask(gateway, body_of(**fields))
                assert answer.status in (200, 400)
                after = await show_servers(gateway)
                assert after["chat-1_h2"][1] == before["chat-1_h2"][1], fields
                assert after["chat-1"][1] == before["chat-1"][1] + 1, fields


async def test_a_client_that_leaves_aborts_its_request_within_100_ms() -> None:
    async with running_gateway() as gateway:
        with fronts(gateway, engine=SLOW) as (front,):
            await until_serving(gateway)
            clients = [await gateway.connect() for _ in range(10)]
            for client in clients:
                client.send("POST", "/v1/chat/completions", body_of(max_tokens=500))
            for client in clients:
                assert (await client.receive_head()).status == 200
            loop = asyncio.get_running_loop()
            left_s = loop.time()
            for client in clients[:5]:
                client.close()
            await wait_for(lambda: front.router.latest.num_open == 5, "five are aborted")
            # A report tells it: at most 50 ms old, and the machine may be busy.
            assert loop.time() - left_s < 0.3
            await asyncio.to_thread(_wait_for_aborts, front, 5)
            assert [line["state"] for line in front.access_log()] == ["aborted"] * 5
            for client in clients[5:]:
                assert await client.reader.readuntil(b"data: ")
                client.close()


def _wait_for_aborts(front: RunningFront, number: int) -> None:
    front.router.wait_for(lambda _report: len(front.access_log()) >= number)


async def test_a_front_killed_with_100_streams_open_cuts_them_and_others_serve() -> None:
    async with running_gateway() as gateway:
        with fronts(gateway, 2, engine=SLOW) as both:
            await until_serving(gateway, 2)
            clients = [await gateway.connect() for _ in range(100)]
            for client in clients:
                client.send("POST", "/v1/chat/completions", body_of(max_tokens=50))
            for client in clients:
                assert (await client.receive_head()).status == 200
            both[1].process.kill()
            answers = [await _rest(client) for client in clients]
            whole = [is_whole for is_whole in answers if is_whole]
            assert 40 <= len(whole) <= 60, "each front had about half of them"
            for _ in range(10):
                assert (await ask(gateway, body_of())).body.endswith(b"data: [DONE]\n\n")
            await wait_for(lambda: gateway.endpoint().failed == 100 - len(whole), "the cut ones are counted")
            await wait_for(lambda: gateway.endpoint().num_in_flight == 0, "nothing stays in flight")
            both[1].process.wait()


async def _rest(client: Client) -> bool:
    """Read a stream to its end; return whether it is whole."""
    data = b""
    try:
        async with asyncio.timeout(20):
            while not data.endswith(b"0\r\n\r\n"):
                part = await client.reader.read(65_536)
                if not part:
                    return False
                data += part
    except OSError:
        return False
    return b"[DONE]" in data


async def test_a_drain_finishes_its_streams_and_its_servers_leave() -> None:
    async with running_gateway() as gateway:
        with fronts(gateway, 2, engine=SLOW) as both:
            await until_serving(gateway, 2)
            clients = [await gateway.connect() for _ in range(8)]
            for client in clients:
                client.send("POST", "/v1/chat/completions", body_of(max_tokens=60))
            for client in clients:
                assert (await client.receive_head()).status == 200
            stopping = asyncio.create_task(asyncio.to_thread(both[0].stop))
            while not stopping.done():
                assert (await ask(gateway, body_of(max_tokens=2))).status == 200
            assert await stopping == 0
            assert all([await _rest(client) for client in clients])

            async def is_gone() -> bool:
                return set(await show_servers(gateway)) == {"chat-2", "chat-2_h2"}

            await until(is_gone)


async def test_with_the_router_dead_haproxy_balances_over_http_1_1_alone() -> None:
    async with running_gateway() as gateway:
        with fronts(gateway):
            await until_serving(gateway)
            assert (await ask(gateway, body_of())).status == 200
            await gateway.kill("router")
            before = await show_servers(gateway)
            for _ in range(5):
                assert (await ask(gateway, body_of())).body.endswith(b"data: [DONE]\n\n")
            after = await show_servers(gateway)
            assert after["chat-1_h2"][1] == before["chat-1_h2"][1]
            assert after["chat-1"][1] == before["chat-1"][1] + 5
            gateway.start_process("router")
            await wait_for(lambda: gateway.is_serving("chat-1"), "the new router knows the front")

            async def is_used() -> bool:
                assert (await ask(gateway, body_of())).status == 200
                return (await show_servers(gateway))["chat-1_h2"][1] > after["chat-1_h2"][1]

            await until(is_used)


async def test_a_client_that_reads_nothing_delays_no_other_stream() -> None:
    """An endless answer, and short ones, to clients that never read."""
    async with running_gateway() as gateway:
        with fronts(gateway, engine=SLOW):
            await until_serving(gateway)
            stalled = []
            for fields in [
                {"max_tokens": None, "ignore_eos": True},
                *[{"max_tokens": 512, "ignore_eos": True}] * 8,
            ]:
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", gateway.port))
                body = body_of(**fields)
                sock.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % len(body)
                    + body
                )
                stalled.append(sock)
            client = await gateway.connect()
            client.send("POST", "/v1/chat/completions", body_of(max_tokens=200, ignore_eos=True))
            assert (await client.receive_head()).status == 200
            loop, gaps, last_s = asyncio.get_running_loop(), [], 0.0
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data = await client.reader.read(65_536)
                now_s = loop.time()
                gaps.append(now_s - last_s if last_s else 0.0)
                last_s = now_s
            # Steps are 20 ms; a blocked connection would stay so until a timeout, a busy machine does not.
            assert max(gaps) < 0.5, sorted(gaps)[-5:]
            servers = await show_servers(gateway)
            assert servers["chat-1_h2"][1] >= 9
            for sock in stalled:
                sock.close()
