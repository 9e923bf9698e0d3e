"""The engine client with real engine processes: outputs, hangs, crashes, loops, the end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
from tests.integration.front_process import SOURCE

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams, StepOutput
from headrace.clock import SystemClock
from headrace.errors import Overloaded
from headrace.replica.engine_client import EngineClient
from headrace.replica.engine_silence import EngineTimeLimits
from headrace.replica.restart import RestartPolicy

pytestmark = pytest.mark.slow
SPEC = EngineSpec("simulated", "simulated", simulated_step_s=0.001)


class RecordingStream:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason = ""
        self.num_flushes = 0
        self.lost_reason = ""
        self.lost_at_s = 0.0
        self.is_broken = False
        self.fails = False

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        if self.fails:
            raise RuntimeError("on purpose")
        self.token_ids += output.token_ids
        self.finish_reason = output.finish_reason or self.finish_reason
        return True

    def flush(self) -> None:
        self.num_flushes += 1

    def on_engine_lost(self, reason: str) -> None:
        assert not self.lost_reason, "told twice"
        self.lost_reason = reason
        self.lost_at_s = time.monotonic()

    def on_broken(self) -> None:
        self.is_broken = True


class World:
    """An engine client, and a way to wait for what it does."""

    def __init__(self, spec: EngineSpec = SPEC, **limits: Any) -> None:
        self._changed = asyncio.Event()
        self.client = EngineClient(
            spec,
            "headrace: engine test",
            SystemClock(),
            self._changed.set,
            EngineTimeLimits(**limits),
            RestartPolicy(min_delay_s=0.01, max_delay_s=0.02),
        )

    async def wait(self, condition: Callable[[], bool], limit_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{self.client} after {limit_s} s: {self.client.last_error}"
            await asyncio.sleep(0.005)

    async def wait_ready(self) -> None:
        await self.wait(lambda: self.client.state == "ready")

    def submit(self, request_id: str, max_tokens: int) -> RecordingStream:
        stream = RecordingStream()
        sampling = SamplingParams(max_tokens=max_tokens)
        self.client.submit(GenerationRequest(request_id, [1, 2, 3], sampling), stream)
        return stream


@pytest.fixture(autouse=True)
def _source_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))


@asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    """Start the client; stop it whatever happens."""
    world.client.start()
    try:
        yield world
    finally:
        await world.client.stop(1.0)
        assert world.client.pid == 0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running(World(silence_s=1.5, check_s=0.05)) as world:
        await world.wait_ready()
        yield world


async def test_outputs_arrive_and_each_step_is_flushed_once(world: World) -> None:
    first, second = world.submit("a", 10), world.submit("b", 20)
    await world.wait(lambda: bool(second.finish_reason))
    assert (len(first.token_ids), first.finish_reason, first.num_flushes) == (10, "length", 10)
    assert (len(second.token_ids), second.num_flushes) == (20, 20)
    assert world.client.num_requests == 0
    assert world.client.load is not None


async def test_an_aborted_request_hears_nothing_more(world: World) -> None:
    stream = world.submit("a", 30_000)
    await world.wait(lambda: bool(stream.token_ids))
    world.client.abort("a")
    num_tokens = len(stream.token_ids)
    await world.wait(lambda: world.client.load is not None and world.client.load.num_running == 0)
    assert len(stream.token_ids) == num_tokens
    assert not stream.finish_reason


async def test_a_stream_with_a_bug_ends_alone(world: World) -> None:
    broken, other = world.submit("broken", 100), world.submit("other", 100)
    broken.fails = True
    await world.wait(lambda: bool(other.finish_reason))
    assert broken.is_broken
    assert len(other.token_ids) == 100


async def test_a_killed_engine_is_noticed_at_once_and_replaced(world: World) -> None:
    stream = world.submit("a", 30_000)
    await world.wait(lambda: bool(stream.token_ids))
    old_pid, killed_at_s = world.client.pid, time.monotonic()
    os.kill(old_pid, signal.SIGKILL)
    await world.wait(lambda: bool(stream.lost_reason))
    # The aim is 0.1 s; the rest is room for a busy machine.
    assert stream.lost_at_s - killed_at_s < 0.5
    with pytest.raises(Overloaded):
        world.submit("b", 1)
    await world.wait(lambda: world.client.state == "ready" and world.client.pid != old_pid)
    again = world.submit("a", 3)
    await world.wait(lambda: again.finish_reason == "length")
    assert world.client.num_restarts == 1


async def test_a_hung_engine_is_killed_and_replaced(world: World) -> None:
    stream = world.submit("a", 30_000)
    await world.wait(lambda: bool(stream.token_ids))
    old = psutil.Process(world.client.pid)
    old.suspend()
    await world.wait(lambda: bool(stream.lost_reason))
    assert "said nothing for 1.5" in stream.lost_reason
    await world.wait(lambda: world.client.state == "ready" and world.client.pid != old.pid)
    assert not old.is_running()
    assert "said nothing" in world.client.last_error


async def test_an_engine_that_cannot_start_is_not_started_again() -> None:
    async with running(World(EngineSpec("native", "/nowhere.gguf"))) as world:
        await world.wait(lambda: world.client.state == "failed" and world.client.pid == 0)
        assert "/nowhere.gguf" in world.client.last_error
        assert (world.client.is_retryable, world.client.num_restarts) == (False, 0)
        with pytest.raises(Overloaded, match=r"/nowhere\.gguf"):
            world.submit("a", 1)


async def test_an_engine_that_dies_while_it_starts_is_given_up_after_five_times() -> None:
    async with running(World(EngineSpec("simulated", "simulated", simulated_start_s=60))) as world:
        client = world.client
        for num_ends in range(5):
            # The front's own words for the time before the engine's first phase end like that.
            await world.wait(lambda: not client.phase.endswith("the engine"))
            assert client.num_restarts == num_ends
            os.kill(client.pid, signal.SIGKILL)
            await world.wait(lambda n=num_ends: client.num_restarts > n or client.state == "failed")
        assert client.state == "failed"
        assert "SIGKILL" in client.last_error


async def test_stop_waits_for_no_engine_that_hangs() -> None:
    async with running(World()) as world:
        await world.wait_ready()
        process = psutil.Process(world.client.pid)
        process.suspend()
        await world.client.stop(0.3)
        assert not process.is_running()
