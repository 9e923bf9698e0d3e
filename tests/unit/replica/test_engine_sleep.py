"""Sleep and wake meet an engine that is being started: what was asked for last is what comes of it."""

from __future__ import annotations

import asyncio

import pytest

from headrace.api.messages import (
    EngineCommand,
    EngineLoad,
    EngineReady,
    EngineSpec,
    Sleep,
    StepBatch,
    Wake,
)
from headrace.clock import SystemClock
from headrace.replica.engine_client import EngineClient
from headrace.replica.engine_process import EngineProcess
from headrace.replica.restart import RestartPolicy


class FakeProcess(EngineProcess):
    """Does what the test says."""

    def __init__(self, client: FakeClient) -> None:
        super().__init__(client)
        self.client = client
        self.spec: EngineSpec | None = None
        self.commands: list[EngineCommand] = []

    @property
    def pid(self) -> int:
        return 7

    async def start(self, spec: EngineSpec, title: str) -> None:
        self.spec = spec
        self.client.started.set()

    def send(self, command: EngineCommand) -> None:
        self.commands.append(command)
        if isinstance(command, Sleep | Wake):
            self.answer(command.level if isinstance(command, Sleep) else 0)

    def answer(self, level: int) -> None:
        self.client.on_event(StepBatch([], EngineLoad(sleep_level=level)))

    def become_ready(self) -> None:
        assert self.spec is not None
        level = 1 if self.spec.is_standby else 0
        self.client.on_event(
            EngineReady("simulated", "toy", 256, 2048, 16, 9, 4, "none", {}, sleep_level=level)
        )


class FakeClient(EngineClient):
    """Starts fakes."""

    def __init__(self, is_standby: bool) -> None:
        spec = EngineSpec("simulated", "toy", is_standby=is_standby)
        self.started = asyncio.Event()
        self.processes: list[FakeProcess] = []
        super().__init__(
            spec, "engine", SystemClock(), lambda: None, None, RestartPolicy(0.001, max_failures=3)
        )

    def make_process(self) -> FakeProcess:
        self.processes.append(FakeProcess(self))
        return self.processes[-1]

    async def next_process(self) -> FakeProcess:
        async with asyncio.timeout(10):
            await self.started.wait()
        self.started.clear()
        return self.processes[-1]

    def lose(self) -> None:
        self.on_lost("the engine process ended")
        self.on_exit("it was killed")


async def begin(is_standby: bool) -> FakeClient:
    client = FakeClient(is_standby)
    client.start()
    (await client.next_process()).become_ready()
    return client


@pytest.mark.parametrize("is_started", [False, True])
async def test_a_wake_that_meets_a_restart_wakes_the_engine_that_comes_back(is_started: bool) -> None:
    client = await begin(is_standby=True)
    assert client.state == "asleep"
    client.lose()
    if is_started:
        process = await client.next_process()
    waking = asyncio.create_task(client.set_sleep(0))
    await asyncio.sleep(0)
    if not is_started:
        process = await client.next_process()
    process.become_ready()
    async with asyncio.timeout(10):
        assert await waking == ""
    assert client.state == "ready"
    await client.stop(0.01)


async def test_a_sleep_that_meets_a_restart_is_slept_at_once() -> None:
    client = await begin(is_standby=False)
    client.lose()
    sleeping = asyncio.create_task(client.set_sleep(1))
    await asyncio.sleep(0)
    process = await client.next_process()
    process.become_ready()
    async with asyncio.timeout(10):
        assert await sleeping == ""
    assert client.state == "asleep"
    assert process.spec is not None
    assert process.spec.is_standby, "it never took its memory"
    await client.stop(0.01)


async def test_a_wake_of_an_engine_that_never_comes_back_says_why() -> None:
    client = await begin(is_standby=True)
    client.lose()
    waking = asyncio.create_task(client.set_sleep(0))
    for _ in range(3):
        await client.next_process()
        client.lose()
    async with asyncio.timeout(10):
        assert "the engine failed and is not started again" in await waking


async def test_an_engine_that_is_awake_is_not_woken() -> None:
    client = await begin(is_standby=False)
    assert await client.set_sleep(0) == ""
    assert client.processes[0].commands == []
    assert client.state == "ready"
    await client.stop(0.01)
