"""A real HAProxy and a real router: one line per ended request, however it ended."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from typing import Any

import pytest
from tests.integration.gateway_rig import Gateway, running_gateway, wait_for

from headrace.api.messages import EndpointRule

pytestmark = pytest.mark.slow


def lines_of(gateway: Gateway) -> list[dict[str, Any]]:
    try:
        with open(gateway.paths.request_log, encoding="utf-8") as file:
            return [json.loads(line) for line in file.read().splitlines()]
    except FileNotFoundError:
        return []


def status_of(line: dict[str, Any]) -> int | None:
    """Not that of an answer which nobody was there to take."""
    return line["status"] if line["state"] != "aborted" else None


async def wait_for_lines(gateway: Gateway, count: int) -> list[dict[str, Any]]:
    await wait_for(lambda: len(lines_of(gateway)) >= count, f"{count} lines")
    await asyncio.sleep(0.15)  # a line too many would come now
    lines = lines_of(gateway)
    assert len(lines) == count, lines
    return lines


async def test_a_finished_request_has_a_line_with_every_fact() -> None:
    async with running_gateway() as gateway:
        task = asyncio.create_task(gateway.chat(headers={"x-request-id": "mine"}, events=3, gap_s=0.02))
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 1, "held")
        await asyncio.sleep(0.3)
        await gateway.add_front("chat-1", is_reporting_finished=True)
        assert (await task).status == 200
        (line,) = await wait_for_lines(gateway, 1)
        mode = stat.S_IMODE(os.stat(gateway.paths.request_log).st_mode)
    assert line["id"].startswith("hr-g1-")
    assert {name: line[name] for name in ("client_id", "gateway", "endpoint", "tenant", "path")} == {
        "client_id": "mine",
        "gateway": "g1",
        "endpoint": "chat",
        "tenant": "",
        "path": "/v1/chat/completions",
    }
    assert abs(line["arrived_s"] - time.time()) < 20
    assert 300 <= line["held_ms"] <= line["first_byte_ms"] + 1 <= line["total_ms"] + 1
    assert line["total_ms"] >= 360 - 1
    assert (line["replica"], line["placement"], line["retries"]) == ("chat-1", "least_loaded", 0)
    assert (line["status"], line["state"], line["finish_reason"]) == (200, "finished", "stop")
    assert (line["prompt_tokens"], line["cached_tokens"], line["output_tokens"]) == (1, 0, 1)
    assert line["bytes_out"] > 0
    assert mode == 0o600


async def test_every_way_to_end_has_its_line() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 1, 30.0), max_body_bytes=1024 * 1024) as gateway:
        held = await gateway.connect()
        held.send("POST", "/v1/completions", b'{"model":"chat"}')
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 1, "held")
        assert (await gateway.chat()).error()["code"] == "queue_full"
        assert (await gateway.chat("nope")).status == 404
        client = await gateway.connect()
        client.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 2097152\r\n\r\n")
        assert (await client.receive_head()).status == 413
        held.close()
        await wait_for(lambda: gateway.endpoint().aborted == 1, "the one that left is counted")
        front = await gateway.add_front("chat-1")
        task = asyncio.create_task(gateway.chat(events=200, gap_s=0.02))
        await wait_for(lambda: front.open_requests, "a stream runs")
        await asyncio.sleep(0.1)
        await front.kill()
        assert not (await task).is_whole
        lines = await wait_for_lines(gateway, 5)
    found = {
        (
            line["state"],
            None if line["state"] == "aborted" else line["status"],
            line["code"],
            line["endpoint"],
        )
        for line in lines
    }
    assert found == {
        ("refused", 503, "queue_full", "chat"),
        ("refused", 404, "", ""),
        ("refused", 413, "", ""),
        ("aborted", None, "", "chat"),
        ("failed", 200, "", "chat"),
    }
    assert len({line["id"] for line in lines}) == 5


async def test_requests_that_the_router_never_saw_have_a_line_too() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        await gateway.kill("router")
        for _ in range(4):  # the first line may still go to the dead router
            assert (await gateway.chat()).status == 200
            await asyncio.sleep(0.1)
        gateway.demand = None
        gateway.start_process("router")
        await wait_for(lambda: gateway.demand and gateway.endpoint().finished >= 1, "counted")
        await wait_for(lambda: len(lines_of(gateway)) == gateway.endpoint().finished, "written")
        lines = lines_of(gateway)
    assert {(line["state"], line["replica"], line["held_ms"], line["output_tokens"]) for line in lines} == {
        ("finished", "chat-1", None, None)
    }


async def test_the_metrics_count_what_the_lines_say() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1", is_reporting_finished=True)
        for _ in range(3):
            assert (await gateway.chat()).status == 200
        await wait_for_lines(gateway, 3)
        reader, writer = await asyncio.open_unix_connection(gateway.paths.metrics_socket)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
    assert 'headrace_router_tenant_requests_total{endpoint="chat",state="finished",tenant=""} 3.0' in text
    assert 'headrace_router_responses_total{endpoint="chat",status="200"} 3.0' in text
    assert 'headrace_router_generation_tokens_total{endpoint="chat",tenant=""} 3.0' in text
    assert 'headrace_router_request_queue_time_seconds_count{endpoint="chat"} 3.0' in text
    assert 'headrace_router_e2e_request_latency_seconds_count{endpoint="chat"} 3.0' in text
