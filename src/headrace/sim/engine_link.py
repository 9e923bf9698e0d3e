"""The real engine client of a front, with engines that are simulated processes.

Owns the way between the two: a socket pair, signals, and the news of an exit. Must not know requests.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from headrace.api.messages import EngineCommand, EngineEvent, EngineSpec
from headrace.replica.engine_client import EngineClient
from headrace.replica.engine_process import EngineProcess as RealEngineProcess
from headrace.replica.engine_silence import EngineTimeLimits
from headrace.replica.kept_memory import KeptMemory
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.restart import RestartPolicy
from headrace.sim.engines import EngineBehaviour, EngineProcess
from headrace.sim.machine import Process
from headrace.sim.network import Connection, End, Weather

TIME_LIMITS = EngineTimeLimits(silence_s=20.0, start_phase_s=120.0, sleep_s=20.0)
"""Shorter than the product's, so that a hang is over within a seed's time."""


class ChildProcess(RealEngineProcess):
    """One simulated engine process as the engine client holds it."""

    def __init__(self, owner: EngineLink) -> None:
        super().__init__(owner)
        self._link = owner
        self._end: End | None = None
        self.child: EngineProcess | None = None

    @property
    def pid(self) -> int:
        return 0 if self.child is None else self.child.pid

    async def start(self, spec: EngineSpec, title: str) -> None:
        link = self._link
        front = link.front
        child = self.child = EngineProcess(
            front.registry, f"engine {front.name}", front.host, spec, link.behaviour
        )
        link.restarts_s.append(front.timeline.now_s)
        link.child = child
        child.on_exit = lambda process, code: front.run(lambda: self._on_child_exit(code))
        connection = Connection(front.registry, link.weather, front, child)
        self._end = connection.ends[0]
        self._end.on_message = self._on_event
        self._end.on_close = lambda: self._lose("the engine process ended")
        child.begin(connection.ends[1])

    def send(self, command: EngineCommand) -> None:
        if self._end is not None and not self._is_lost:
            self._end.send(command)

    def _on_event(self, event: EngineEvent) -> None:
        if not self._is_lost:
            self._owner.on_event(event)

    def _on_child_exit(self, code: int) -> None:
        loop = asyncio.get_running_loop()
        if not self._is_lost:
            loop.call_later(0.05, self._lose, "the engine process ended")
        loop.call_later(0.06, self._owner.on_exit, f"the engine process exited with status {code}")

    def _lose(self, reason: str) -> None:
        super()._lose(reason)
        if self._end is not None:
            self._end.close()

    def _signal(self, number: signal.Signals) -> None:
        child = self.child
        if child is None or not child.is_alive:
            return
        if number == signal.SIGKILL:
            child.kill()
        else:
            child.run(child.terminate)


class EngineLink(EngineClient):
    """The engine client of one simulated front."""

    def __init__(
        self,
        front: Process,
        weather: Weather,
        spec: EngineSpec,
        behaviour: EngineBehaviour,
        digest: PrefixDigest,
        on_change: Callable[[], None],
        is_untimely: Callable[[], bool],
    ) -> None:
        super().__init__(
            spec, front.name, front.host, on_change, TIME_LIMITS, RestartPolicy(), digest, is_untimely
        )
        self.kv_memory = KeptMemory(is_wanted=False)  # processes of a simulation have no memory of their own
        self.front = front
        self.weather = weather
        self.behaviour = behaviour
        self.restarts_s: list[float] = []
        """True times of the starts, for the checks."""
        self.child: EngineProcess | None = None
        """The last one that was started."""

    def make_process(self) -> ChildProcess:
        return ChildProcess(self)
