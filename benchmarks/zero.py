"""From zero: the first token of a request that finds no replica; 0 to 8 replicas and back under load."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import headrace
from benchmarks.report import Aim, Report, Table
from benchmarks.system import ENDPOINT, MODEL, free_port
from benchmarks.watched_replicas import replicas_of, wait_for
from benchmarks.watched_streams import Ask, StreamResult, ask, make_client
from headrace.bench.statistics import percentile
from headrace.control.serve import System

STANDBY, PACKED, COLD = "standby", "cold start, packed weights", "cold start"
AIMS_S = {STANDBY: 0.3, PACKED: 3.0, COLD: 6.0}
STEP_CLIENTS = 64
STEP_S = 20.0
IDLE_S = 4.0


def run(*, is_quick: bool) -> Report:
    """Measure first tokens from zero in three ways, then a step of load."""
    count = 2 if is_quick else 50
    report = Report(
        "zero",
        "Scale to zero and back",
        f"{MODEL}, native engine, one replica at most, at zero when each request comes (`headrace scale "
        f"{ENDPOINT} 0` before it); {count} requests each way, one at a time, to their first token. Then "
        f"the simulated engine under a step of load: {STEP_CLIENTS} streams at a time for {STEP_S:g} s from "
        "zero, at most 8 replicas, and none afterwards.",
    )
    samples = {way: measure_first_tokens(way, count) for way in AIMS_S}
    for way, aim_s in AIMS_S.items():
        median_s = percentile(sorted(samples[way]), 0.5)
        figure = f"first token from zero, {way}, p50"
        report.aims.append(Aim(figure, f"at most {aim_s:g} s", f"{median_s:.2f} s", median_s <= aim_s))
    report.tables.append(_distribution(samples))
    timeline, results = measure_step(5.0 if is_quick else STEP_S)
    lost = [result for result in results if not result.is_done or result.error]
    figure = f"requests lost of {len(results)}, 0 to 8 replicas and back"
    report.aims.append(Aim(figure, "0", str(len(lost)), not lost))
    report.tables.append(_timeline(timeline))
    report.data = {"first_token_s": samples, "timeline": timeline, "lost": [r.error for r in lost]}
    return report


# ---- the first token


def measure_first_tokens(way: str, count: int) -> list[float]:
    """Return seconds from request to first token, each time from zero replicas."""
    config = _config(way)
    samples = []
    wanted = ["standby"] if way == STANDBY else []
    with headrace.serve(config) as system:
        for number in range(count + 1):
            system.scale(ENDPOINT, 0)
            wait_for(system, lambda replicas: [replica.state for replica in replicas] == wanted)
            result = asyncio.run(_one(system, Ask(number, 5, 4)))
            if not result.first_s:
                raise RuntimeError(f"{way}: no first token: {result.status} {result.error}")
            if number:  # the first start packs the weights
                samples.append(result.first_s - result.begin_s)
    return samples


async def _one(system: System, request: Ask) -> StreamResult:
    async with make_client(1) as client:
        return await ask(client, system.url, request)


def _config(way: str) -> dict[str, Any]:
    replicas = {"min": 0, "max": 1, "standby": 1 if way == STANDBY else 0}
    native = {"kv_cache_mb": 128, "packed_dir": "off" if way == COLD else "auto"}
    endpoint = {"model": MODEL, "replicas": replicas, "native": native, "drain_grace_s": 5}
    return {"endpoints": {ENDPOINT: endpoint}, "gateway": {"bind": f"127.0.0.1:{free_port()}"}}


# ---- the step


def measure_step(step_s: float) -> tuple[list[tuple[float, int, int, int]], list[StreamResult]]:
    """Return (seconds, wanted, ready, requests held) over time, and what each request came to."""
    endpoint = {
        "model": MODEL,
        "engine": "simulated",
        "replicas": {"min": 0, "max": 8},
        "simulated": {"step_ms": 20.0, "start_s": 1.0},
        "native": {"max_running": 8},
        "max_open": 8,
        "scaling": {"down_after_s": 2.0, "idle_to_zero_s": IDLE_S},
        "drain_grace_s": 20,
    }
    config = {"endpoints": {ENDPOINT: endpoint}, "gateway": {"bind": f"127.0.0.1:{free_port()}"}}
    with headrace.serve(config) as system:
        return asyncio.run(_step(system, step_s))


async def _step(
    system: System, step_s: float
) -> tuple[list[tuple[float, int, int, int]], list[StreamResult]]:
    results: list[StreamResult] = []
    timeline: list[tuple[float, int, int, int]] = []
    began_s = time.monotonic()
    limit_s = step_s + 90.0

    async def one_client(number: int) -> None:
        while time.monotonic() - began_s < step_s:
            results.append(await ask(client, system.url, Ask(number, 5, 60)))

    async with make_client(STEP_CLIENTS) as client:
        clients = asyncio.gather(*(one_client(number) for number in range(STEP_CLIENTS)))
        while True:
            status = await asyncio.to_thread(system.status)
            [endpoint] = status.endpoints
            now_s = time.monotonic() - began_s
            timeline.append((round(now_s, 2), endpoint.desired, endpoint.ready, endpoint.num_held))
            if (clients.done() and not replicas_of(system)) or now_s > limit_s:
                break
            await asyncio.sleep(0.25)
        await clients
    return timeline, results


# ---- tables


def _distribution(samples: dict[str, list[float]]) -> Table:
    ranks = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    rows = [
        [
            way,
            str(len(values)),
            f"{min(values):.2f}",
            *(f"{percentile(sorted(values), rank):.2f}" for rank in ranks),
        ]
        for way, values in samples.items()
    ]
    headers = ("way", "requests", "least", "p10", "p25", "p50", "p75", "p90", "p99", "most")
    return Table(
        "Request to first token from zero replicas, seconds (cumulative distribution)", headers, rows
    )


def _timeline(timeline: list[tuple[float, int, int, int]]) -> Table:
    rows: list[list[str]] = []
    for (at_s, *values), (_, *before) in zip(timeline, [(0.0, -1, -1, -1), *timeline], strict=False):
        if values[:2] != before[:2]:
            rows.append([f"{at_s:.1f}", *map(str, values)])
    return Table("A step of load", ("s", "replicas wanted", "ready", "requests held"), rows)
