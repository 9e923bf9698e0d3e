"""A real HAProxy, a real router, mock fronts, tenants with keys: limits and shares as clients see them."""

from __future__ import annotations

import asyncio
from hashlib import sha256

import pytest
from tests.integration.gateway_rig import Gateway, HttpAnswer, running_gateway, wait_for

from headrace.api.messages import EndpointRule, TenantDemand, TenantRule

pytestmark = pytest.mark.slow
KEYS = {sha256(name.encode()).hexdigest(): name for name in ("flood", "light", "limited", "few")}
CHAT = EndpointRule("chat", "mock", 64, 30.0)


async def chat(gateway: Gateway, tenant: str, **mock: float) -> HttpAnswer:
    """Ask with a tenant's key, which is its name."""
    return await gateway.chat("chat", {"authorization": f"Bearer {tenant}"}, **mock)


def demand(gateway: Gateway, tenant: str) -> TenantDemand | None:
    assert gateway.demand is not None
    return next((each for each in gateway.demand.tenants if each.tenant == tenant), None)


async def test_a_flood_fills_the_queue_and_a_light_tenant_is_still_next() -> None:
    tenants = [TenantRule("flood"), TenantRule("light")]
    async with running_gateway(CHAT, tenants=tenants, keys=KEYS) as gateway:
        flood = [asyncio.create_task(chat(gateway, "flood", events=2, gap_s=0.05)) for _ in range(64)]
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 64, "the queue is full")
        light = asyncio.create_task(chat(gateway, "light"))
        await wait_for(lambda: demand(gateway, "light") is not None, "the light one is held, too")
        front = await gateway.add_front("chat-1", max_open=2)
        answer = await light
        assert answer.status == 200
        assert front.served.index(answer.headers["x-request-id"]) < 4, "it did not wait for the flood"
        answers = await asyncio.gather(*flood)
        refused = [answer for answer in answers if answer.status == 503]
        assert [answer.error()["code"] for answer in refused] == ["queue_full"], "one of the flood made room"
        assert int(refused[0].headers["retry-after"]) >= 1
        await wait_for(lambda: gateway.endpoint().finished == 64, "all others are served")


async def test_a_rate_limit_is_a_429_in_openais_shape_with_retry_after() -> None:
    tenants = [TenantRule("limited", requests_per_minute=3), TenantRule("light")]
    async with running_gateway(CHAT, tenants=tenants, keys=KEYS) as gateway:
        await gateway.add_front("chat-1")
        answers = [await chat(gateway, "limited") for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429]
        error = answers[3].error()
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert "limits.requests_per_minute is 3" in error["message"]
        assert 1 <= int(answers[3].headers["retry-after"]) <= 20
        assert (await chat(gateway, "light")).status == 200


async def test_a_tenant_at_its_limit_waits_and_no_slot_leaks() -> None:
    tenants = [TenantRule("few", max_concurrent=2), TenantRule("light")]
    async with running_gateway(CHAT, tenants=tenants, keys=KEYS) as gateway:
        front = await gateway.add_front("chat-1", max_open=32)
        tasks = [asyncio.create_task(chat(gateway, "few", events=2, gap_s=0.03)) for _ in range(20)]
        most_open = 0
        while not all(task.done() for task in tasks):
            most_open = max(most_open, len(front.open_requests))
            await asyncio.sleep(0.002)
        assert {task.result().status for task in tasks} == {200}
        assert most_open == 2
        assert (await chat(gateway, "few")).status == 200
        await wait_for(lambda: gateway.endpoint().finished == 21, "all are counted")
        seen = demand(gateway, "few")
        assert seen is not None
        assert (seen.num_held, seen.num_in_flight, seen.finished) == (0, 0, 21)
