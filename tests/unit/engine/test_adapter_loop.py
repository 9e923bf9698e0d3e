"""The process loop of engines that step by themselves, over a fake backend. Real processes: tests/slow."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from tests.unit.engine.test_adapter import FakeBackend

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Abort,
    Drain,
    EngineCommand,
    EngineEvent,
    GenerationRequest,
    SamplingParams,
    Sleep,
    StepBatch,
    Submit,
)
from headrace.clock import SystemClock
from headrace.engine import adapter_loop
from headrace.engine.adapter import AdaptedEngine, BackendOutput, BackendStep
from headrace.engine.adapter_loop import AdapterLoop
from headrace.engine.channel import FrontChannel, FrontGone
from headrace.engine.process import DrainSignal
from headrace.errors import EngineDead

DEADLINE_S = 10.0


class Rig:
    """The front's end of the socket; the loop runs as a task at the other."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self.socket = ours
        self.backend = FakeBackend()
        clock = SystemClock()
        self.drain = DrainSignal()
        loop = AdapterLoop(AdaptedEngine(self.backend, clock), FrontChannel(theirs), self.drain, clock)
        self.done = asyncio.create_task(loop.run())
        self.batches: list[StepBatch] = []
        self._decoder: FrameDecoder[EngineEvent] = FrameDecoder(EngineEvent)

    async def send(self, *commands: EngineCommand) -> None:
        data = b"".join(encode_frame(command) for command in commands)
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def until(self, is_enough: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_enough():
                data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)
                assert data, "the engine's end is closed"
                for event in self._decoder.feed(data):
                    assert isinstance(event, StepBatch)
                    self.batches.append(event)

    async def until_submitted(self, *ids: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            for request_id in ids:
                assert (await self.backend.submissions.get()).request_id == request_id

    async def ended(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.done

    def endings(self) -> list[tuple[str, str | None]]:
        outputs = [output for batch in self.batches for output in batch.outputs]
        return [(output.request_id, output.finish_reason) for output in outputs if output.finish_reason]


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(adapter_loop, "HEARTBEAT_S", 0.01)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        rig = Rig(ours, theirs)
        try:
            yield rig
        finally:
            os.close(rig.drain.wakeup_fd)
            os.close(rig.drain._write_fd)
            rig.done.cancel()
            await asyncio.gather(rig.done, return_exceptions=True)


def submit(request_id: str, num_prompt: int = 2) -> Submit:
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    return Submit(GenerationRequest(request_id, [1] * num_prompt, sampling))


def step(*outputs: BackendOutput) -> BackendStep:
    return BackendStep(list(outputs), num_running=len(outputs))


async def test_every_request_ends_exactly_once_and_a_drain_waits_for_them(rig: Rig) -> None:
    await rig.send(submit("a"), submit("too long", 64), submit("b"), submit("left"))
    await rig.until_submitted("a", "b", "left")
    await rig.send(Abort("left"), Drain(), submit("late"))
    await rig.until(lambda: ("late", "error") in rig.endings())
    assert not rig.done.done()
    rig.backend.steps.put_nowait(step(BackendOutput("a", [1], "stop"), BackendOutput("left", [1])))
    rig.backend.steps.put_nowait(step(BackendOutput("b", [1], "length")))
    await rig.until(lambda: ("b", "length") in rig.endings())
    await rig.ended()
    assert sorted(rig.endings()) == [
        ("a", "stop"),
        ("b", "length"),
        ("late", "error"),
        ("too long", "error"),
    ]


async def test_a_double_id_ends_both_requests_with_one_error(rig: Rig) -> None:
    await rig.send(submit("same"), submit("same"))
    await rig.until(rig.endings)
    assert rig.endings() == [("same", "error")]
    assert rig.backend.aborted == ["same"]


async def test_sigterm_drains(rig: Rig) -> None:
    await rig.send(submit("a"))
    await rig.until_submitted("a")
    os.kill(os.getpid(), signal.SIGTERM)
    rig.backend.steps.put_nowait(step(BackendOutput("a", [1], "stop")))
    await rig.until(lambda: ("a", "stop") in rig.endings())
    await rig.ended()


async def test_heartbeats_come_while_the_backend_answers_and_stop_when_it_hangs(rig: Rig) -> None:
    await rig.until(lambda: len(rig.batches) >= 3)
    assert rig.backend.num_checks >= 3

    async def hang() -> None:
        await asyncio.Event().wait()

    rig.backend.check = hang  # type: ignore[method-assign]
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):  # noqa: PT012, silence is what is waited for
        while True:
            await asyncio.wait_for(loop.sock_recv(rig.socket, 1 << 16), 0.1)


async def test_sleep_is_refused_with_its_reason(rig: Rig) -> None:
    await rig.send(Sleep(1))
    await rig.until(lambda: any(batch.load.sleep_error for batch in rig.batches))
    (told,) = [batch.load for batch in rig.batches if batch.load.sleep_error]
    assert "no sleep" in told.sleep_error
    assert told.sleep_level == 0


async def test_more_waiting_requests_than_the_limit_are_refused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_loop, "MAX_WAITING", 2)
    await rig.send(*(submit(name) for name in "abcd"))
    await rig.until(lambda: len(rig.endings()) == 2)
    assert rig.endings() == [("c", "error"), ("d", "error")]


async def test_a_dead_backend_ends_the_loop_at_once(rig: Rig) -> None:
    rig.backend.steps.put_nowait(EngineDead("the core is gone"))
    with pytest.raises(EngineDead, match="the core is gone"):
        await rig.ended()


async def test_the_loop_ends_when_the_front_leaves(rig: Rig) -> None:
    await rig.send(submit("a"))
    rig.socket.close()
    with pytest.raises(FrontGone):
        await rig.ended()
