"""The local launcher: child processes of this machine's supervisor, asked for over its socket.

Owns the connection. A supervisor that goes away is final (it takes every process with it): LauncherLost.
Must not know: what the processes do.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from headrace.api.messages import (
    LauncherEvent,
    ListProcesses,
    ProcessSpec,
    StartProcess,
    StopProcess,
)
from headrace.errors import HeadraceError
from headrace.fabric.channel import Channel, connect
from headrace.fabric.supervisor import SUPERVISOR_SOCKET

CONNECT_TIMEOUT_S = 5.0
MAX_QUEUED_EVENTS = 10_000


class LauncherLost(HeadraceError):
    """The launcher is gone, and with it everything it ran."""


class LocalLauncher:
    """The Launcher over `supervisor.sock`. Made by `connect`."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[LauncherEvent | None] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._channel = Channel(LauncherEvent, self._on_event, self._on_close)
        self._lost_reason = ""

    def __repr__(self) -> str:
        return f"LocalLauncher({self._lost_reason or 'connected'})"

    @classmethod
    async def connect(cls, run_directory: Path) -> LocalLauncher:
        """Connect to the supervisor of `run_directory`. Raises LauncherLost."""
        launcher = cls()
        path = str(run_directory / SUPERVISOR_SOCKET)
        try:
            await connect(path, launcher._channel, CONNECT_TIMEOUT_S)
        except OSError as error:  # TimeoutError is one
            raise LauncherLost(f"the supervisor does not answer on {path}: {error}") from error
        return launcher

    def start(self, spec: ProcessSpec) -> None:
        self._channel.send(StartProcess(spec))

    def stop(self, name: str, grace_s: float) -> None:
        self._channel.send(StopProcess(name, grace_s))

    def list_processes(self) -> None:
        self._channel.send(ListProcesses())

    async def next_event(self) -> LauncherEvent:
        event = None if self._lost_reason and self._events.empty() else await self._events.get()
        if event is None:
            raise LauncherLost(f"the supervisor is gone: {self._lost_reason}")
        return event

    def close(self) -> None:
        self._channel.close()

    def _on_event(self, channel: Channel, event: LauncherEvent) -> None:
        if self._events.full():
            channel.close("more events than the controller takes")
        else:
            self._events.put_nowait(event)

    def _on_close(self, channel: Channel, reason: str) -> None:
        self._lost_reason = reason
        if not self._events.full():
            self._events.put_nowait(None)
