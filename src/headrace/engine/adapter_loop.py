"""The process of an engine that steps by itself: commands go in as they come, batches out as steps end.

Owns order, drain, heartbeats and the end of such a process; `engine.process` owns its start. A heartbeat says
that the backend's processes answered: one that hangs is silent, and the front ends it.
Must not know any backend's words, text or HTTP.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine

import msgspec

from headrace.api.messages import (
    Abort,
    Drain,
    EngineCommand,
    GenerationRequest,
    Sleep,
    StepBatch,
    StepOutput,
    Submit,
    Wake,
)
from headrace.clock import Clock
from headrace.engine.adapter import AdaptedEngine
from headrace.engine.channel import FrontChannel
from headrace.engine.process import HEARTBEAT_S, MAX_WAITING, DrainSignal, say
from headrace.errors import Overloaded, RequestError

_NO_SLEEP = "an engine of this kind has no sleep; set replicas.standby to 0 and start replicas instead"


class AdapterLoop:
    """Three tasks that share one engine: commands, steps, heartbeats."""

    def __init__(
        self, engine: AdaptedEngine, channel: FrontChannel, drain: DrainSignal, clock: Clock
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._drain = drain
        self._clock = clock
        self._drained = asyncio.Event()
        self._next_heartbeat_s = clock.now_s()

    async def run(self) -> None:
        """Return when a drain is complete. Raises FrontGone, ProtocolError, EngineDead."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._begin_drain)
        parts: list[Coroutine[None, None, object]] = [
            self._read_commands(),
            self._send_steps(),
            self._send_heartbeats(),
            self._drained.wait(),
        ]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            if self._drain.is_set:  # it came while the engine started
                self._begin_drain()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- from the front

    async def _read_commands(self) -> None:
        while True:
            await self._until_readable()
            for command in self._channel.receive(0.0):
                await self._apply(command)

    async def _until_readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        fd = self._channel.fileno()
        loop.add_reader(fd, _settle, readable)
        try:
            await readable
        finally:
            loop.remove_reader(fd)

    async def _apply(self, command: EngineCommand) -> None:
        match command:
            case Submit(request):
                await self._submit(request)
            case Abort(request_id):
                await self._engine.abort(request_id)
            case Drain():
                self._begin_drain()
            case Sleep() | Wake():
                load = msgspec.structs.replace(self._engine.load(), sleep_error=_NO_SLEEP)
                self._send(StepBatch([], load))
        self._end_if_drained()

    async def _submit(self, request: GenerationRequest) -> None:
        try:
            self._check_open()
            await self._engine.submit(request)
        except RequestError as error:
            # The id must end exactly once: if it is a double, the first one ends here too.
            await self._engine.abort(request.request_id)
            refusal = StepOutput(request.request_id, finish_reason="error", error=error.message)
            self._send(StepBatch([refusal], self._engine.load()))

    def _check_open(self) -> None:
        if self._drain.is_set:
            raise Overloaded("the engine is draining and takes no more requests")
        if self._engine.num_waiting() >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} requests wait in the engine already; send it again later")

    # ---- to the front

    async def _send_steps(self) -> None:
        while True:
            self._send(await self._engine.next_batch())
            self._end_if_drained()

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._next_heartbeat_s - self._clock.now_s()))
            await self._engine.check()
            if self._clock.now_s() >= self._next_heartbeat_s:
                self._send(StepBatch([], self._engine.load()))

    def _send(self, batch: StepBatch) -> None:
        self._next_heartbeat_s = self._clock.now_s() + HEARTBEAT_S
        self._channel.send(batch)

    # ---- the end

    def _begin_drain(self) -> None:
        if not self._drain.is_set:
            say(f"draining, {self._engine!r}")
        self._drain.is_set = True
        self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._drain.is_set and not self._engine.has_work():
            self._drained.set()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
