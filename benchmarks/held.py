"""As many held requests as one gateway can have: how fast they come, what they cost, how fast they go."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections import Counter
from dataclasses import dataclass

import psutil
from tests.integration.gateway_rig import Client, Gateway, running_gateway, wait_for

from benchmarks.report import Aim, Report, Table
from headrace.api.messages import EndpointRule
from headrace.units import MIB

NUM_HELD = 8000
QUICK_NUM_HELD = 500
AIM_BYTES = 300 * MIB
BODY_BYTES = (200, 8000)
MAX_OPEN = 256


@dataclass(frozen=True)
class Held:
    """One run. Bytes are resident, of the router and of both HAProxy processes."""

    body_bytes: int
    opened_s: float
    released_s: float
    num_served: int
    router_bytes: int
    haproxy_bytes: int
    haproxy_released_bytes: int
    num_descriptors: int


def run(*, is_quick: bool) -> Report:
    """Measure with mock fronts: no engine, so that only the gateway is seen."""
    count = QUICK_NUM_HELD if is_quick else NUM_HELD
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        runs = [asyncio.run(_measure(count, size)) for size in BODY_BYTES]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    report = Report(
        "held",
        "Requests held at zero replicas",
        f"{count} connections with one request each, opened 200 at a time; then one replica with max_open "
        f"{MAX_OPEN} comes. Client and replica are one Python process on the same cores, and take most of "
        f"the time. Descriptor limit {hard}.",
    )
    headers = (
        "body bytes",
        "opened s",
        "released s",
        "served",
        "router MiB",
        "HAProxy MiB held",
        "HAProxy MiB after",
        "HAProxy descriptors",
    )
    report.tables.append(Table(f"{count} held requests", headers, [_row(held) for held in runs]))
    worst = max(held.router_bytes for held in runs)
    report.aims.append(
        Aim(
            f"router's memory with {count} held requests",
            "at most 300 MiB",
            f"{worst / MIB:.0f} MiB",
            worst <= AIM_BYTES,
        )
    )
    return report


def _row(held: Held) -> list[str]:
    return [
        str(held.body_bytes),
        f"{held.opened_s:.2f}",
        f"{held.released_s:.2f}",
        str(held.num_served),
        f"{held.router_bytes / MIB:.0f}",
        f"{held.haproxy_bytes / MIB:.0f}",
        f"{held.haproxy_released_bytes / MIB:.0f}",
        str(held.num_descriptors),
    ]


async def _measure(count: int, body_bytes: int) -> Held:
    async with running_gateway(EndpointRule("chat", "mock", count, 300.0)) as gateway:
        began_s = time.perf_counter()
        clients = await _open(gateway, count, body_bytes)
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == count, "all held", 60)
        opened_s = time.perf_counter() - began_s
        router = psutil.Process(gateway.processes["router"].pid)
        master = psutil.Process(gateway.processes["haproxy"].pid)
        worker = master.children()[0]
        haproxy_bytes = master.memory_info().rss + worker.memory_info().rss
        router_bytes, num_descriptors = router.memory_info().rss, worker.num_fds()
        began_s = time.perf_counter()
        await gateway.add_front("chat-1", max_open=MAX_OPEN)
        statuses = Counter(
            [answer.status for answer in await asyncio.gather(*(c.receive() for c in clients))]
        )
        released_s = time.perf_counter() - began_s
        after_bytes = master.memory_info().rss + worker.memory_info().rss
        router_bytes = max(router_bytes, router.memory_info().rss)
    return Held(
        body_bytes,
        opened_s,
        released_s,
        statuses[200],
        router_bytes,
        haproxy_bytes,
        after_bytes,
        num_descriptors,
    )


async def _open(gateway: Gateway, count: int, body_bytes: int) -> list[Client]:
    content = "x" * body_bytes
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": content}]}).encode()
    slots = asyncio.Semaphore(200)

    async def open_one() -> Client:
        async with slots:
            client = await gateway.connect()
            client.send("POST", "/v1/chat/completions", body)
            await client.writer.drain()
            return client

    return await asyncio.gather(*(open_one() for _ in range(count)))
