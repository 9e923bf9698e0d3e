"""A real HAProxy and a real router with as many held requests as the descriptors of one process allow."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest
from tests.integration.gateway_rig import Client, Gateway, running_gateway, wait_for

from headrace.api.messages import EndpointRule
from headrace.units import MIB

pytestmark = pytest.mark.slow
NUM_HELD = 8000
MAX_ROUTER_BYTES = 300 * MIB
BODY = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "x" * 200}]}).encode()


@pytest.fixture
def descriptors() -> Iterator[int]:
    """As many as the hard limit allows, for this test's own connections, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def open_held(gateway: Gateway, count: int) -> list[Client]:
    slots = asyncio.Semaphore(200)

    async def open_one() -> Client:
        async with slots:
            client = await Client("127.0.0.1", gateway.port).open()
            client.send("POST", "/v1/chat/completions", BODY)
            return client

    return await asyncio.gather(*(open_one() for _ in range(count)))


async def read_all(clients: list[Client]) -> Counter[int]:
    async def read(client: Client) -> int:
        async with asyncio.timeout(30):
            status = (await client.receive()).status
        client.close()  # its place at the gateway is free for one that waits
        return status

    return Counter(await asyncio.gather(*(read(client) for client in clients)))


async def test_8000_held_requests_cost_little_memory_and_are_all_served(descriptors: int) -> None:
    if descriptors < 2 * NUM_HELD + 1024:
        pytest.skip(f"needs {2 * NUM_HELD + 1024} file descriptors; the hard limit is {descriptors}")
    async with running_gateway(
        EndpointRule("chat", "mock", NUM_HELD, 60.0), EndpointRule("other", "mock", 8, 60.0)
    ) as gateway:
        await gateway.add_front("other-1", "other")
        clients = await open_held(gateway, NUM_HELD)
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == NUM_HELD, "all held", 20)
        router = psutil.Process(gateway.processes["router"].pid)
        assert router.memory_info().rss < MAX_ROUTER_BYTES
        assert router.num_fds() < 512, "held requests share their connections to the router"
        assert (await gateway.chat("other")).status == 200, "other endpoints do not wait behind them"
        await gateway.add_front("chat-1", max_open=256)
        assert await read_all(clients) == {200: NUM_HELD}
        await wait_for(lambda: gateway.endpoint().finished == NUM_HELD, "each is counted once")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (NUM_HELD, 0, 0)
        assert router.memory_info().rss < MAX_ROUTER_BYTES


async def test_at_its_limit_of_connections_a_gateway_still_serves_what_it_holds() -> None:
    limit = 400
    async with running_gateway(max_connections=limit) as gateway:
        clients = await open_held(gateway, limit + 30)
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == limit, "full")
        await gateway.add_front("chat-1", max_open=256)
        assert await read_all(clients) == {200: limit + 30}
        await wait_for(lambda: gateway.endpoint().finished == limit + 30, "each is counted once")
