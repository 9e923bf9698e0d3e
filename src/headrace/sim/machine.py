"""Simulated machines and processes: clocks that disagree, and processes that die or are stopped for a while.

Owns what SIGKILL and SIGSTOP mean for a process's timers and incoming messages. Must not know what the
processes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Protocol

from headrace.sim.timeline import Call, Timeline, Timer


class Host:
    """One machine: its monotonic clock has its own zero and rate, and may jump forward."""

    def __init__(self, timeline: Timeline, name: str, skew: float) -> None:
        """skew: how much faster than true time its clock runs, as a part; 0.001 is 1 ms per second."""
        self._timeline = timeline
        self.name = name
        self._rate = 1.0 + skew
        self._offset_s = timeline.random(f"clock {name}").uniform(10.0, 1e6)
        self._set_s = 0.0

    def __repr__(self) -> str:
        return f"<Host {self.name} at {self.now_s():.3f}>"

    def now_s(self) -> float:
        return self._offset_s + (self._timeline.now_s - self._set_s) * self._rate

    def now_ns(self) -> int:
        return round(self.now_s() * 1e9)

    def wall_s(self) -> float:
        return 1.7e9 + self.now_s()

    def jump(self, seconds: float) -> None:
        """Let the clock jump forward, as after a suspended machine."""
        self._offset_s += seconds


class Closes(Protocol):
    """Something a process holds that the kernel closes with it."""

    def owner_died(self, process: Process) -> None: ...


class Registry:
    """What all processes of one world share: pids, and who listens where."""

    def __init__(self, timeline: Timeline, check: Callable[[Process], None]) -> None:
        """check: called after each event of a process, with that process."""
        self.timeline = timeline
        self.check = check
        self.pids = count(1000)
        self.listeners: dict[str, Process] = {}
        self.errors: list[BaseException] = []
        """Of coroutines, that nobody took."""


class ProcessTimer(Timer):
    """One event to come of one process."""

    __slots__ = ("_process", "_wish")

    def __init__(self, process: Process, wish: Call, kind: str) -> None:
        super().__init__(0.0, self._run, kind)
        self._process = process
        self._wish = wish

    def _run(self) -> None:
        self._process.run(self._happen)

    def _happen(self) -> None:
        if not self.is_cancelled:  # it may have been, while this process was stopped
            self._wish()


class Process:
    """One process of the world. Subclasses are its program."""

    is_outside = False
    """It belongs to no machine of the system, and reaches all of them whatever is between those."""

    def __init__(self, registry: Registry, name: str, host: Host) -> None:
        self.registry = registry
        self.timeline = registry.timeline
        self.name = name
        self.host = host
        self.pid = next(registry.pids)
        self.random: Random = registry.timeline.random(f"{name} {self.pid}")
        self.num_events = 0
        self.is_alive = True
        self.is_paused = False
        self.held: dict[Closes, None] = {}
        """Connections, closed by the kernel when this process ends."""
        self.on_exit: Callable[[Process, int], None] | None = None
        """Its parent's SIGCHLD: this process, its exit code."""
        self.loop: asyncio.AbstractEventLoop | None = None
        """The running loop while it does something; programs with coroutines have one."""
        self._backlog: list[Call] = []
        self._addresses: list[str] = []

    def __repr__(self) -> str:
        state = "paused" if self.is_paused else "alive" if self.is_alive else "dead"
        return f"<{self.name} pid {self.pid} {state}>"

    # ---- time

    def after(self, delay_s: float, call: Call, kind: str) -> Timer:
        """Let `call` happen in this process; later if it is stopped then, never if it is dead."""
        timer = ProcessTimer(self, call, kind)
        timeline = self.timeline
        timeline.put(timer, timeline.now_s + delay_s)
        return timer

    def run(self, call: Call) -> None:
        """Do one thing as this process, as soon as it runs."""
        if not self.is_alive:
            return
        if self.is_paused:
            self._backlog.append(call)
            return
        if self.loop is None:
            call()
        else:
            self._run_in_loop(call)
        self.registry.check(self)

    def _run_in_loop(self, call: Call) -> None:
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self.loop)
        try:
            call()
        finally:
            asyncio._set_running_loop(before)

    # ---- listening

    def listen(self, address: str) -> None:
        self.registry.listeners[address] = self
        self._addresses.append(address)

    def stop_listening(self) -> None:
        """Take no more connections, at any of its addresses."""
        for address in self._addresses:
            if self.registry.listeners.get(address) is self:
                del self.registry.listeners[address]

    def accept(self, address: str, connection: object) -> None:
        """A connection came to one of its addresses."""
        raise NotImplementedError

    # ---- signals

    def pause(self) -> None:
        """SIGSTOP."""
        self.is_paused = True

    def resume(self) -> None:
        """SIGCONT: what came meanwhile is read, in its order."""
        if not self.is_paused or not self.is_alive:
            return
        self.is_paused = False
        backlog, self._backlog = self._backlog, []
        for call in backlog:
            # One event each, so that the checks run between them.
            self.timeline.after(0.0, lambda call=call: self.run(call), "resumed")  # type: ignore[misc]

    def terminate(self) -> None:
        """SIGTERM; dies at once unless its program does better."""
        self.exit(-15)

    def kill(self) -> None:
        """SIGKILL."""
        self.exit(-9)

    def exit(self, code: int) -> None:
        """End, and let the kernel close what it holds."""
        if not self.is_alive:
            return
        self.is_alive = False
        self._backlog.clear()
        self.stop_listening()
        held, self.held = self.held, {}
        for thing in held:
            thing.owner_died(self)
        self.died(code)
        if self.on_exit is not None:
            self.on_exit(self, code)

    def died(self, code: int) -> None:
        """For programs whose death takes others along."""
