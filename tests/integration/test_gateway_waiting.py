"""A real HAProxy, router and relay, mock fronts: streams whose wait is told to their clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_rig import Client, Gateway, running_gateway, wait_for

from headrace.api.framing import encode_frame
from headrace.api.messages import EndpointOutlook, EndpointRule, Outlook

pytestmark = pytest.mark.slow
SOON = EndpointRule("chat", "mock", 1024, 30.0, tell_after_s=0.2)


async def open_stream(gateway: Gateway, **fields: Any) -> Client:
    client = await gateway.connect()
    body = {"model": "chat", "stream": True, "mock": {"events": 3}, **fields}
    client.send("POST", "/v1/chat/completions", json.dumps(body).encode(), {"x-request-id": "mine"})
    return client


def say(gateway: Gateway, eta_s: float) -> None:
    for writer in gateway._controllers:
        writer.write(encode_frame(Outlook([EndpointOutlook("chat", eta_s, "chat-1 starts")])))


async def read_comment(client: Client) -> bytes:
    size = int((await client.reader.readuntil(b"\r\n")).strip(), 16)
    return (await client.reader.readexactly(size + 2))[:-2]


async def test_a_stream_at_zero_replicas_is_told_that_it_waits_and_then_served() -> None:
    async with running_gateway(SOON) as gateway:
        await wait_for(lambda: gateway.demand, "the router speaks with its controller")
        say(gateway, 20.0)
        client = await open_stream(gateway)
        head = await client.receive_head()
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert 15 < float(head.headers["x-headrace-eta-s"]) <= 20
        assert head.headers["x-request-id"] == "mine"
        assert (await read_comment(client)).startswith(b": waiting for a replica, expected in ")
        await wait_for(lambda: gateway.endpoint().num_held == 1, "it is still held, once")
        assert gateway.endpoint().arrived == 1
        front = await gateway.add_front("chat-1")
        body = b""
        while not body.endswith(b"data: [DONE]\n\n"):
            body += await read_comment(client)
        assert body.count(b"data: ") == 4
        assert await client.reader.readuntil(b"\r\n") == b"0\r\n"
        await wait_for(lambda: gateway.endpoint().finished == 1, "finished")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (1, 0, 0)
        seen = front.headers_seen[0]
        assert {name for name in seen if name.startswith("x-headrace-")} == {"x-headrace-request-id"}


async def test_a_client_that_leaves_while_it_is_told_is_cancelled_and_counted_once() -> None:
    async with running_gateway(SOON) as gateway:
        client = await open_stream(gateway)
        await client.receive_head()
        client.close()
        await wait_for(lambda: gateway.endpoint().aborted == 1, "cancelled")
        front = await gateway.add_front("chat-1")
        assert (await gateway.chat()).status == 200
        assert len(front.served) == 1
        await wait_for(lambda: gateway.endpoint().finished == 1, "the next one finished")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (2, 0, 0)


async def test_a_wait_that_is_too_long_ends_in_an_error_event() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 8, 0.6, tell_after_s=0.1)) as gateway:
        answer = await (await open_stream(gateway)).receive()
        assert (answer.status, answer.is_whole) == (200, True)
        comment, event, rest = answer.body.split(b"\n\n")
        assert comment.startswith(b": waiting")
        assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "overloaded"
        assert rest == b""
        await wait_for(lambda: gateway.endpoint().refused == 1, "counted once")


@pytest.mark.parametrize("fields", [{"stream": False}, {"stream": True, "padding": "x" * 100_000}])
async def test_what_is_no_stream_waits_in_silence_and_what_is_long_is_told_all_the_same(
    fields: dict[str, Any],
) -> None:
    async with running_gateway(SOON) as gateway:
        client = await open_stream(gateway, **fields)
        reading = asyncio.create_task(client.receive())
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 1, "held")
        await asyncio.sleep(0.5)  # longer than tell_after_s: what is checked is that nothing happens
        await gateway.add_front("chat-1")
        answer = await reading
        assert answer.status == 200
        assert (b": waiting" in answer.body) == fields["stream"]


async def test_a_relay_that_dies_costs_its_waiting_streams_and_leaks_nothing() -> None:
    async with running_gateway(SOON) as gateway:
        client = await open_stream(gateway)
        await client.receive_head()
        await wait_for(lambda: gateway.endpoint().num_held == 1, "held")
        os.kill(gateway.processes["relay"].pid, signal.SIGKILL)
        assert not (await client.reader.read()).endswith(b"0\r\n\r\n")
        await wait_for(lambda: gateway.endpoint().aborted == 1, "ended")
        await gateway.add_front("chat-1")
        held = await open_stream(gateway)  # without a relay it is simply served
        assert (await held.receive()).status == 200


async def test_a_refusal_says_when_a_replica_is_expected() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 0, 30.0)) as gateway:
        await wait_for(lambda: gateway.demand, "the router speaks with its controller")
        say(gateway, 20.0)
        async with asyncio.timeout(5):
            while "x-headrace-eta-s" not in (answer := await gateway.chat()).headers:
                pass  # the controller's word is on its way
        assert (answer.status, answer.error()["code"]) == (503, "queue_full")
        assert 15 < float(answer.headers["x-headrace-eta-s"]) <= 20
        assert 15 <= int(answer.headers["retry-after"]) <= 20


async def test_many_streams_wait_and_all_are_served() -> None:
    async with running_gateway(SOON) as gateway:
        clients = [await open_stream(gateway) for _ in range(200)]
        for client in clients:
            await client.receive_head()
        await gateway.add_front("chat-1", max_open=16)
        for client in clients:
            assert (await client.reader.readuntil(b"\r\n0\r\n\r\n")).count(b"data: ") == 4
        await wait_for(lambda: gateway.endpoint().finished == 200, "each is counted once")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (200, 0, 0)


def records(gateway: Gateway) -> list[dict[str, Any]]:
    path = Path(gateway.paths.request_log)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("num_leaving", [2, 3])
async def test_a_stream_that_leaving_fronts_refuse_in_turn_is_served_by_the_next_one(
    num_leaving: int,
) -> None:
    async with running_gateway(SOON) as gateway:
        client = await open_stream(gateway)
        await client.receive_head()
        leaving = [
            await gateway.add_front(f"chat-{number}", is_refusing=True, is_reporting_finished=True)
            for number in range(num_leaving)
        ]
        await wait_for(lambda: all(front.num_refused for front in leaving), "each refused it")
        assert gateway.endpoint().refused == 0
        for front in leaving:
            front.drain()
        await wait_for(lambda: gateway.endpoint().num_held == 1, "it is held again")
        front = await gateway.add_front("chat-ready", is_reporting_finished=True)
        answer = await client.reader.readuntil(b"\r\n0\r\n\r\n")
        events = [line for line in answer.split(b"\n") if line.startswith(b"data: ")]
        assert events == [b"data: 0", b"data: 1", b"data: 2", b"data: [DONE]"]
        await wait_for(lambda: gateway.endpoint().finished == 1, "finished")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (1, 0, 0)
        assert (demand.refused, demand.failed, demand.aborted) == (0, 0, 0)
        assert len(front.served) == 1
        seen = front.headers_seen[0]
        assert {name for name in seen if name.startswith("x-headrace-")} == {"x-headrace-request-id"}
        await wait_for(lambda: records(gateway), "its line is written")
        (record,) = records(gateway)
        assert (record["state"], record["replica"], record["status"]) == ("finished", "chat-ready", 200)
        whole_ms = 1  # HAProxy's times are cut to milliseconds, and begin a moment earlier or later than ours
        assert record["held_ms"] - whole_ms <= record["first_byte_ms"] <= record["total_ms"]


async def test_a_stream_that_nobody_takes_ends_in_one_error_event_at_its_limit() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 8, 2.0, tell_after_s=0.1)) as gateway:
        client = await open_stream(gateway)
        await client.receive_head()
        front = await gateway.add_front("chat-1", is_refusing=True)
        await wait_for(lambda: front.num_refused, "refused")
        front.drain()
        answer = await client.reader.readuntil(b"\r\n0\r\n\r\n")
        (event,) = [line for line in answer.split(b"\n") if line.startswith(b"data: ")]
        assert "queue.max_wait_s" in json.loads(event.removeprefix(b"data: "))["error"]["message"]
        await wait_for(lambda: gateway.endpoint().refused == 1, "counted once")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (1, 0, 0)
        await wait_for(lambda: records(gateway), "its line is written")
        assert [record["state"] for record in records(gateway)] == ["refused"]


async def test_a_client_that_leaves_while_its_stream_is_refused_is_counted_once() -> None:
    async with running_gateway(SOON) as gateway:
        client = await open_stream(gateway)
        await client.receive_head()
        front = await gateway.add_front("chat-1", is_refusing=True)
        await wait_for(lambda: front.num_refused, "refused")
        client.close()
        await wait_for(lambda: gateway.endpoint().aborted == 1, "ended")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (1, 0, 0)


async def test_a_router_that_is_killed_between_refusals_costs_no_stream() -> None:
    async with running_gateway(SOON) as gateway:
        client = await open_stream(gateway)
        await client.receive_head()
        front = await gateway.add_front("chat-1", is_refusing=True)
        await wait_for(lambda: front.num_refused, "refused")
        await gateway.kill("router")
        gateway.demand = None
        gateway.start_process("router")
        await wait_for(lambda: gateway.is_serving("chat-1"), "the next router knows its replica")
        front.is_refusing = False
        answer = await client.reader.readuntil(b"\r\n0\r\n\r\n")
        assert answer.count(b"data: ") == 4
        await wait_for(lambda: gateway.endpoint().num_in_flight == 0, "ended there, too")
