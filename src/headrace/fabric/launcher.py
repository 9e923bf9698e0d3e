"""The seam between the controller, which decides, and whatever starts processes for it.

Owns the Protocol and its fake. Everything is an event: a command returns at once, its result arrives through
`next_event`, so that a slow or dead launcher can never hold up the controller's tick.
Must not know: what the processes do, or why they are started.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from headrace.api.messages import (
    LauncherError,
    LauncherEvent,
    ProcessEnded,
    Processes,
    ProcessSpec,
    ProcessStarted,
    ProcessState,
)


class Launcher(Protocol):
    """Starts and stops processes. Implementations: `local` (child processes), later `ray`."""

    def start(self, spec: ProcessSpec) -> None:
        """Start a process. ProcessStarted or LauncherError follows."""
        ...

    def stop(self, name: str, grace_s: float) -> None:
        """Ask a process to end, and kill its group after grace_s (>= 0). ProcessEnded follows.
        A second call can only bring the end forward."""
        ...

    def list_processes(self) -> None:
        """Ask for all live processes. Processes follows."""
        ...

    async def next_event(self) -> LauncherEvent:
        """Wait for the next event. Raises LauncherLost once the launcher is gone."""
        ...

    def close(self) -> None:
        """Let go of the launcher; what it runs goes on."""
        ...


class FakeLauncher:
    """A launcher without processes, for tests: `end` and `refuse_starts` play what processes do."""

    def __init__(self) -> None:
        self.alive: dict[str, ProcessSpec] = {}
        self.stopping: dict[str, float] = {}
        self.num_started = 0
        self.refuse_starts = ""
        self._events: asyncio.Queue[LauncherEvent] = asyncio.Queue(maxsize=10_000)
        self._pids: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"FakeLauncher({len(self.alive)} alive, {len(self.stopping)} stopping)"

    def start(self, spec: ProcessSpec) -> None:
        if self.refuse_starts or spec.name in self.alive:
            self._events.put_nowait(LauncherError(spec.name, self.refuse_starts or "already runs"))
            return
        self.num_started += 1
        self.alive[spec.name] = spec
        self._pids[spec.name] = 1000 + self.num_started
        self._events.put_nowait(ProcessStarted(self._state(spec.name)))

    def stop(self, name: str, grace_s: float) -> None:
        if name not in self.alive:
            self._events.put_nowait(LauncherError(name, "no such process"))
            return
        self.stopping[name] = min(grace_s, self.stopping.get(name, grace_s))

    def list_processes(self) -> None:
        self._events.put_nowait(Processes([self._state(name) for name in self.alive]))

    async def next_event(self) -> LauncherEvent:
        return await self._events.get()

    def close(self) -> None:
        pass

    def take_events(self) -> list[LauncherEvent]:
        """Return all events so far without waiting."""
        events = []
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events

    def end(self, name: str, exit_code: int = 0, last_output: str = "") -> None:
        """Let a process end."""
        state = self._state(name)
        del self.alive[name]
        self.stopping.pop(name, None)
        self._events.put_nowait(ProcessEnded(ProcessState(name, state.pid, False, exit_code, last_output)))

    def _state(self, name: str) -> ProcessState:
        return ProcessState(name, self._pids[name], is_alive=True)
