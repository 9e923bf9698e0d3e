"""A real HAProxy, a real router, mock fronts: requests that wait, and how each of them ends."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from tests.integration.gateway_rig import Client, Gateway, running_gateway, wait_for

from headrace.api.messages import EndpointRule

pytestmark = pytest.mark.slow


async def open_held_request(gateway: Gateway) -> Client:
    client = await gateway.connect()
    client.send("POST", "/v1/chat/completions", json.dumps({"model": "chat"}).encode())
    return client


async def test_a_request_at_zero_replicas_is_held_and_served_when_one_comes() -> None:
    async with running_gateway() as gateway:
        client = await open_held_request(gateway)
        await wait_for(
            lambda: gateway.demand and gateway.endpoint().num_held == 1, "held, and told as demand"
        )
        await gateway.add_front("chat-1")
        answer = await client.receive()
        assert (answer.status, answer.headers["x-replica"]) == (200, "chat-1")
        client.close()
        await wait_for(lambda: gateway.endpoint().finished == 1, "finished")
        assert gateway.endpoint().num_held == 0


@pytest.mark.parametrize("num_requests", [64, 500])
async def test_many_requests_are_held_at_once_and_all_are_served(num_requests: int) -> None:
    async with running_gateway() as gateway:
        waiting = [asyncio.create_task(gateway.chat()) for _ in range(num_requests)]
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == num_requests, "all are held")
        await gateway.add_front("chat-1", max_open=16)
        answers = await asyncio.gather(*waiting)
        assert [answer.status for answer in answers] == [200] * num_requests
        await wait_for(lambda: gateway.endpoint().finished == num_requests, "all are counted once")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (num_requests, 0, 0)


async def test_a_full_queue_refuses_with_retry_after_and_keeps_what_it_holds() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 2, 30.0)) as gateway:
        held = [await open_held_request(gateway) for _ in range(2)]
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 2, "two are held")
        answer = await gateway.chat()
        assert (answer.status, answer.error()["code"]) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        await gateway.add_front("chat-1")
        assert [(await client.receive()).status for client in held] == [200, 200]
        await wait_for(lambda: gateway.endpoint().finished == 2, "finished")
        assert gateway.endpoint().refused == 1


async def test_a_request_that_waits_too_long_is_refused_with_retry_after() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 8, 0.3)) as gateway:
        answer = await gateway.chat()
        assert (answer.status, answer.error()["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert "0.3 s" in answer.error()["message"]
        await wait_for(lambda: gateway.endpoint().refused == 1, "counted once")


async def test_a_held_request_whose_client_left_is_cancelled_within_half_a_second() -> None:
    async with running_gateway() as gateway:
        leaving = [await open_held_request(gateway) for _ in range(20)]
        staying = await open_held_request(gateway)
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 21, "all are held")
        for client in leaving:
            client.close()
        await wait_for(lambda: gateway.endpoint().num_held == 1, "those that left are cancelled", 0.5)
        assert gateway.endpoint().aborted == 20
        front = await gateway.add_front("chat-1")
        assert (await staying.receive()).status == 200
        assert len(front.served) == 1
        staying.close()


async def test_a_full_replica_gets_no_more_than_it_takes() -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1", max_open=3)
        tasks = [asyncio.create_task(gateway.chat(events=2, gap_s=0.1)) for _ in range(9)]
        most_open = 0
        while not all(task.done() for task in tasks):
            most_open = max(most_open, len(front.open_requests))
            await asyncio.sleep(0.005)
        assert most_open == 3
        assert {task.result().status for task in tasks} == {200}


async def test_a_client_that_leaves_during_its_stream_frees_the_replica() -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1", max_open=1)
        client = await gateway.connect()
        body = json.dumps({"model": "chat", "mock": {"events": 1000, "gap_s": 0.01}})
        client.send("POST", "/v1/chat/completions", body.encode())
        await client.receive_head()
        client.close()
        assert (await gateway.chat()).status == 200
        await wait_for(lambda: not front.open_requests, "the front has nothing open")
        await wait_for(lambda: gateway.endpoint().finished == 1, "the second finished")
        assert gateway.endpoint().aborted == 1


async def test_a_router_that_is_asked_to_end_refuses_what_it_holds() -> None:
    async with running_gateway() as gateway:
        held = [await open_held_request(gateway) for _ in range(20)]
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 20, "all are held")
        gateway.signal("router", gateway.specs["router"].stop_signal)
        for client in held:
            answer = await client.receive()
            assert (answer.status, answer.error()["message"]) == (503, "The gateway is stopping.")
        await wait_for(lambda: gateway.processes["router"].poll() == 0, "it ended well")
        assert "router.sock" not in os.listdir(gateway.paths.directory)
