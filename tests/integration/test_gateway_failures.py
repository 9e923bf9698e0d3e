"""A real HAProxy, a real router, mock fronts: replicas come and go, and each part dies or stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from tests.integration.gateway_rig import Gateway, HttpAnswer, running_gateway, wait_for

from headrace.api.messages import EndpointRule

pytestmark = pytest.mark.slow


class Load:
    """Clients that ask again and again, until told to stop."""

    def __init__(self, gateway: Gateway, num_clients: int, **mock: float) -> None:
        self.answers: list[HttpAnswer] = []
        self._gateway, self._mock = gateway, mock
        self._is_stopping = False
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(num_clients)]

    async def _ask(self) -> None:
        while not self._is_stopping:
            self.answers.append(await self._gateway.chat(**self._mock))

    async def wait_for_more(self, count: int) -> None:
        wanted = len(self.answers) + count
        await wait_for(lambda: len(self.answers) >= wanted, f"{count} more answers")

    async def stop(self) -> Counter[tuple[int, bool]]:
        self._is_stopping = True
        await asyncio.gather(*self._tasks)
        return Counter((answer.status, answer.is_whole) for answer in self.answers)


async def test_replicas_join_and_leave_under_load_without_a_reload_or_an_error() -> None:
    async with running_gateway() as gateway:
        first = await gateway.add_front("chat-1")
        num_workers = haproxy_log(gateway).count("New worker")
        assert num_workers == 1
        load = Load(gateway, 8, events=3, gap_s=0.005)
        await load.wait_for_more(20)
        second = await gateway.add_front("chat-2")
        await load.wait_for_more(40)
        assert second.served
        first.drain()
        await asyncio.wait_for(first.is_released.wait(), 5)
        await wait_for(lambda: not first.open_requests, "its streams end")
        served = len(first.served)
        await load.wait_for_more(40)
        assert len(first.served) == served, "a released replica got another request"
        await wait_for(lambda: "chat-1" not in config_of(gateway), "it left the config")
        assert set(await load.stop()) == {(200, True)}
        assert haproxy_log(gateway).count("New worker") == num_workers, "HAProxy was reloaded"


def haproxy_log(gateway: Gateway) -> str:
    return Path(gateway.specs["haproxy"].log_path).read_text()


def config_of(gateway: Gateway) -> str:
    return Path(gateway.paths.config).read_text()


async def test_a_replica_killed_before_the_first_byte_is_replaced_by_another() -> None:
    async with running_gateway() as gateway:
        broken = await gateway.add_front("chat-1")
        await gateway.add_front("chat-2")
        broken.fail_before_first_byte = True
        answers = [await gateway.chat() for _ in range(6)]
        assert {(answer.status, answer.headers["x-replica"]) for answer in answers} == {(200, "chat-2")}
        await broken.kill()
        await wait_for(lambda: not gateway.is_serving("chat-1"), "the dead replica is noticed", 1.0)
        await wait_for(lambda: "chat-1" not in config_of(gateway), "it left the config")


async def test_a_replica_that_dies_during_a_stream_cuts_it_and_is_counted_as_failed() -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1")
        task = asyncio.create_task(gateway.chat(events=100, gap_s=0.02))
        await wait_for(lambda: front.open_requests, "the stream runs")
        await asyncio.sleep(0.1)
        await front.kill()
        answer = await task
        assert not answer.is_whole
        assert b"[DONE]" not in answer.body
        await wait_for(lambda: gateway.endpoint().failed == 1, "counted as failed")


async def test_with_the_router_dead_requests_are_served_and_a_new_router_finds_everything() -> None:
    async with running_gateway() as gateway:
        for name in ("chat-1", "chat-2"):
            await gateway.add_front(name)
        load = Load(gateway, 4, events=2, gap_s=0.005)
        await load.wait_for_more(10)
        await gateway.kill("router")
        await load.wait_for_more(40)
        answer = await gateway.chat("nope")
        assert (answer.status, answer.error()["code"]) == (404, "model_not_found")
        assert "chat" in answer.error()["message"]
        gateway.demand = None
        gateway.start_process("router")
        await wait_for(lambda: gateway.is_serving("chat-1") and gateway.is_serving("chat-2"), "both are back")
        await load.wait_for_more(40)
        await wait_for(lambda: gateway.endpoint().finished > 40, "HAProxy asks the new router")
        assert set(await load.stop()) == {(200, True)}
        await wait_for(lambda: gateway.endpoint().num_in_flight == 0, "nothing is in flight")
        demand = gateway.endpoint()
        assert demand.arrived == demand.finished


async def test_requests_held_by_a_router_that_dies_are_held_by_the_next_one() -> None:
    async with running_gateway() as gateway:
        waiting = [asyncio.create_task(gateway.chat()) for _ in range(10)]
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 10, "held")
        await gateway.kill("router")
        waiting += [asyncio.create_task(gateway.chat()) for _ in range(10)]  # these find none
        gateway.demand = None
        gateway.start_process("router")
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 20, "held again, each once")
        await gateway.add_front("chat-1")
        answers = await asyncio.gather(*waiting)
        assert [(answer.status, answer.is_whole) for answer in answers] == [(200, True)] * 20
        await wait_for(lambda: gateway.endpoint().finished == 20, "each is counted once")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (20, 0, 0)


async def test_without_a_router_and_a_relay_a_request_at_zero_replicas_gets_an_answer() -> None:
    async with running_gateway() as gateway:
        await gateway.kill("relay")
        waiting = [asyncio.create_task(gateway.chat()) for _ in range(10)]
        await wait_for(lambda: gateway.demand and gateway.endpoint().num_held == 10, "held")
        await gateway.kill("router")
        answers = await asyncio.gather(*waiting)
        assert {(answer.status, answer.error()["code"]) for answer in answers} == {(503, "overloaded")}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)


async def test_with_the_router_stopped_requests_are_served_within_seconds() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        gateway.signal("router", signal.SIGSTOP)
        started_s = asyncio.get_running_loop().time()
        answer = await gateway.chat()
        assert answer.status == 200
        assert asyncio.get_running_loop().time() - started_s < 3.0
        gateway.signal("router", signal.SIGCONT)
        await wait_for(lambda: gateway.is_serving("chat-1"), "it is back")
        await wait_for(lambda: gateway.endpoint().finished == 1, "counted once")
        demand = gateway.endpoint()
        assert (demand.arrived, demand.num_held, demand.num_in_flight) == (1, 0, 0)


async def test_a_restarted_haproxy_has_its_servers_back() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        held = asyncio.create_task(gateway.chat(events=100, gap_s=0.05))
        await wait_for(lambda: gateway.endpoint().num_in_flight == 1, "a stream runs")
        await gateway.kill("haproxy")
        with pytest.raises((OSError, asyncio.IncompleteReadError, AssertionError)):
            assert (await held).is_whole
        gateway.start_process("haproxy")
        await gateway.wait_until_haproxy_answers()
        assert (await gateway.chat()).status == 200
        await gateway.add_front("chat-2")
        answers = await asyncio.gather(*(gateway.chat(gap_s=0.1) for _ in range(8)))
        assert {answer.headers["x-replica"] for answer in answers} == {"chat-1", "chat-2"}


async def test_new_endpoints_come_by_a_reload_that_loses_nothing() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        load = Load(gateway, 4, events=3, gap_s=0.01)
        await load.wait_for_more(10)
        rules = [*gateway.spec.endpoints, EndpointRule("more", "mock", 8, 30.0)]
        gateway.send_spec(msgspec.structs.replace(gateway.spec, endpoints=rules))
        await wait_for(
            lambda: len(gateway.demand.endpoints) == 2 if gateway.demand else False, "two endpoints"
        )
        await gateway.add_front("more-1", "more")
        assert (await gateway.chat("more")).headers["x-replica"] == "more-1"
        await load.wait_for_more(10)
        assert set(await load.stop()) == {(200, True)}


async def test_haproxy_drains_its_streams_when_asked_to_end() -> None:
    async with running_gateway() as gateway:
        front = await gateway.add_front("chat-1")
        stream = asyncio.create_task(gateway.chat(events=20, gap_s=0.02))
        await wait_for(lambda: front.open_requests, "the stream runs")
        gateway.signal("router", gateway.specs["router"].stop_signal)
        gateway.signal("haproxy", gateway.specs["haproxy"].stop_signal)
        answer = await stream
        assert answer.is_whole
        assert answer.body.endswith(b"data: [DONE]\n\n")
        for name in ("router", "haproxy"):
            await wait_for(lambda name=name: gateway.processes[name].poll() is not None, f"{name} ended")
        assert gateway.processes["router"].returncode == 0


async def test_every_request_of_a_stormy_day_is_counted_exactly_once() -> None:
    async with running_gateway(EndpointRule("chat", "mock", 16, 0.5)) as gateway:
        await gateway.add_front("chat-1", max_open=4, is_reporting_finished=True)
        load = Load(gateway, 30, events=2, gap_s=0.01)
        await load.wait_for_more(30)
        second = await gateway.add_front("chat-2", max_open=4)
        await load.wait_for_more(30)
        leaving = [await gateway.connect() for _ in range(10)]
        for client in leaving:
            client.send("POST", "/v1/completions", b'{"model":"chat"}')
        await load.wait_for_more(10)
        for client in leaving:
            client.close()
        await second.kill()
        await load.wait_for_more(30)
        answers = await load.stop()
        await wait_for(
            lambda: gateway.endpoint().num_in_flight + gateway.endpoint().num_held == 0,
            "everything has ended",
        )
        demand = gateway.endpoint()
        ended = demand.finished + demand.aborted + demand.refused + demand.failed
        assert demand.arrived == ended == sum(answers.values()) + 10, f"{demand} {answers}"
        assert demand.refused >= answers[(503, True)]


async def test_nonsense_on_the_routers_sockets_harms_nobody() -> None:
    async with running_gateway() as gateway:
        await gateway.add_front("chat-1")
        nonsense = (b"\xff" * 64, b"\x00\x00\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n", b"x" * 20_000)
        for name in ("router.sock", "spoe.sock", "completions.sock", "metrics.sock"):
            for data in nonsense:
                reader, writer = await asyncio.open_unix_connection(gateway.paths.path(name))
                writer.write(data)
                writer.write_eof()
                with contextlib.suppress(OSError):
                    await asyncio.wait_for(reader.read(100_000), 7)
                writer.close()
        assert (await gateway.chat()).status == 200
        await wait_for(lambda: gateway.endpoint().finished == 1, "it is counted")
        assert gateway.processes["router"].poll() is None
        assert "Traceback" not in gateway.log("router")
