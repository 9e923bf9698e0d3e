"""A real HAProxy and a real router: stopped under load, without reports, and lied to. Nothing leaks, nothing
is counted twice, and who lies harms only itself."""

from __future__ import annotations

import asyncio
import json
import math
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.integration.gateway_rig import Gateway, running_gateway, wait_for
from tests.integration.test_gateway_failures import Load
from tests.integration.test_gateway_records import lines_of

from headrace.api.framing import encode_frame
from headrace.api.messages import (
    EngineLoad,
    FinishedRequest,
    LoadReport,
    TerminalState,
)

pytestmark = pytest.mark.slow
GOOD = {
    "replica_id": "chat-9",
    "endpoint": "chat",
    "model": "mock",
    "address": "127.0.0.1:9",
    "pid": 99,
    "sequence": 1,
    "lease_s": 3.0,
    "state": "draining",
    "max_open": 4,
}


def check_conserved(gateway: Gateway) -> None:
    demand = gateway.endpoint()
    ended = demand.finished + demand.aborted + demand.refused + demand.failed
    assert demand.arrived == demand.num_held + demand.num_in_flight + ended, demand


async def wait_until_idle(gateway: Gateway) -> None:
    def is_idle() -> bool:
        demand = gateway.endpoint()
        return demand.num_in_flight == demand.num_held == 0

    await wait_for(is_idle, "nothing is open")
    check_conserved(gateway)


@asynccontextmanager
async def reporting(gateway: Gateway) -> AsyncIterator[asyncio.StreamWriter]:
    """A connection to the router's socket for load reports."""
    _, writer = await asyncio.open_unix_connection(gateway.paths.router_socket)
    try:
        yield writer
    finally:
        writer.transport.abort()


async def test_a_router_stopped_under_load_costs_no_request_and_decides_nothing_stale() -> None:
    async with running_gateway() as gateway:
        fronts = [await gateway.add_front(f"chat-{number}", max_open=4) for number in (1, 2)]
        load = Load(gateway, 12, events=3, gap_s=0.01)
        await load.wait_for_more(20)
        gateway.signal("router", signal.SIGSTOP)
        await load.wait_for_more(20)
        await fronts[0].kill()  # the stopped router does not know
        await load.wait_for_more(20)
        gateway.signal("router", signal.SIGCONT)
        await wait_for(lambda: not gateway.is_serving("chat-1"), "it sees who left meanwhile")
        served = len(fronts[0].served)
        await load.wait_for_more(30)
        answers = await load.stop()
        assert len(fronts[0].served) == served
        # The killed replica's streams may be cut; nothing else fails.
        assert set(answers) <= {(200, True), (200, False), (502, True)}, answers
        assert answers[(200, False)] + answers[(502, True)] <= 12
        await wait_until_idle(gateway)


@pytest.mark.parametrize("is_silent", [True, False], ids=["silent", "cut"])
async def test_lost_reports_cost_no_stream_and_leak_no_slot(is_silent: bool) -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1", max_open=3, is_reporting_finished=True)
        streams = [asyncio.create_task(gateway.chat(events=60, gap_s=0.03)) for _ in range(3)]
        await wait_for(lambda: len(front.open_requests) == 3, "three streams run")
        front.lose_reports(is_silent=is_silent)
        await wait_for(lambda: not gateway.is_serving("chat-1"), "its lease ends", 3.0)
        waiting = asyncio.create_task(gateway.chat())
        await wait_for(lambda: gateway.endpoint().num_held == 1, "nobody is sent to it")
        front.report_again()
        answers = await asyncio.gather(*streams, waiting)
        assert {(answer.status, answer.is_whole) for answer in answers} == {(200, True)}
        # Every slot can be used again: as many run at a time as the replica takes, and no more.
        more = [asyncio.create_task(gateway.chat(events=5, gap_s=0.02)) for _ in range(9)]
        most_open = 0
        while not all(task.done() for task in more):
            most_open = max(most_open, len(front.open_requests))
            await asyncio.sleep(0.005)
        assert most_open == 3
        await wait_until_idle(gateway)
        assert gateway.endpoint().finished == gateway.endpoint().arrived == 13


def nonsense() -> list[LoadReport]:
    """Reports that decode, and cannot be true."""
    huge = 2**62
    ends = [
        FinishedRequest(
            request_id, TerminalState.FINISHED, "stop", "x", prompt, cached, output, ttft_s, total_s
        )
        for request_id, prompt, cached, output, ttft_s, total_s in (
            ("hr-g1-unknown", -5, -5, -5, -1.0, -1.0),
            ("", huge, huge, huge, math.inf, math.inf),
            ("x" * 5000, 1, 9, 1, math.nan, math.nan),
        )
    ]
    engine = EngineLoad(num_running=-1, num_waiting=huge, num_free_blocks=huge, num_total_blocks=-1)
    changes: list[dict[str, Any]] = [
        {"lease_s": math.nan},
        {"lease_s": -1.0},
        {"lease_s": 1e300},
        {"num_open": -1},
        {"max_open": huge},
        {"num_open": huge, "open_by_gateway": {"g1": -huge}, "open_by_tenant": {"a": huge, "b": -1}},
        {"address": "nowhere"},
        {"address": "127.0.0.1:99999999"},
        {"address": "127.0.0.1:1 server evil 10.0.0.1:1"},
        {"replica_id": "../../etc/passwd\n"},
        {"replica_id": "x" * 100_000},
        {"endpoint": "nope"},
        {"endpoint": "chat\n  server evil"},
        {"engine": engine},
        {"finished": ends},
        {"prefixes_added": [number % 2**63 for number in range(200_000)]},
        {"prefixes_added": [0] * 1000, "prefixes_removed": [2**64 - 1, 0, 0], "prefix_epoch": -huge},
        {"replica_id": "chat-1", "pid": 4242, "sequence": huge, "address": "127.0.0.1:9"},
        {"replica_id": "chat-1", "pid": 4242, "endpoint": "other", "lease_s": 0.0001},
    ]
    return [LoadReport(**{**GOOD, "sequence": number + 1, **change}) for number, change in enumerate(changes)]


async def test_a_replica_that_reports_nonsense_harms_only_itself() -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1", is_reporting_finished=True)
        load = Load(gateway, 4, events=2, gap_s=0.005)
        await load.wait_for_more(10)
        for report in nonsense():
            async with reporting(gateway) as writer:
                writer.write(encode_frame(report))
                await writer.drain()
                await asyncio.sleep(0.02)
            await load.wait_for_more(2)
        whole = encode_frame(LoadReport(**GOOD))
        wrong_body = whole[:4] + b"\x00" * (len(whole) - 4)
        for data in (whole[: len(whole) // 2], b"\xff\xff\xff\xff" + whole, wrong_body):
            async with reporting(gateway) as writer:
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(0.02)
        await load.wait_for_more(10)
        assert set(await load.stop()) == {(200, True)}
        await wait_until_idle(gateway)
        # On a busy machine HAProxy may have gone on without the router for a moment: the lines tell of those.
        await wait_for(
            lambda: gateway.endpoint().finished == gateway.endpoint().arrived == len(front.served),
            "all counted",
        )
        assert gateway.is_serving("chat-1")
        assert gateway.processes["router"].poll() is None
        assert "Traceback" not in gateway.log("router")
        assert all((line["output_tokens"] or 0) in (0, 1) for line in lines_of(gateway))


async def test_ends_told_twice_late_or_of_nobody_count_once() -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1", max_open=2)
        stream = asyncio.create_task(gateway.chat(events=40, gap_s=0.02))
        await wait_for(lambda: front.open_requests, "a stream runs")
        (request_id,) = front.open_requests
        ends = [
            FinishedRequest(name, TerminalState.FINISHED, "stop", "", 1, 0, 1, 0.01, 0.1)
            for name in (request_id, request_id, "hr-g1-nobody", "hr-g2-elsewhere")
        ]
        line = json.dumps({"id": request_id, "backend": "ep-chat", "server": "chat-1", "status": 200}) + "\n"
        _, completions = await asyncio.open_unix_connection(gateway.paths.completions_socket)
        async with reporting(gateway) as writer:
            for sequence in (1, 1, 2):  # the second is a duplicate, all come too early
                writer.write(encode_frame(LoadReport(**{**GOOD, "sequence": sequence}, finished=ends)))
            await writer.drain()
            completions.write(2 * line.encode())  # HAProxy's own line comes at the stream's end, a third time
            await completions.drain()
            assert (await stream).is_whole
            await wait_for(lambda: gateway.endpoint().finished == 1, "counted")
            writer.write(encode_frame(LoadReport(**{**GOOD, "sequence": 3}, finished=ends)))
            completions.write(line.encode())
            await asyncio.sleep(0.3)
        completions.transport.abort()
        answers = [await gateway.chat() for _ in range(4)]
        assert Counter(answer.status for answer in answers) == {200: 4}
        await wait_until_idle(gateway)
        await wait_for(lambda: gateway.endpoint().finished == 5, "those, too")
        assert gateway.endpoint().arrived == 5
