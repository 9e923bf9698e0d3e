"""The supervisor: holds all processes of one machine, so that they end with it, and answers the controller.

Owns child processes and the controller's restarts; nothing else is ever restarted here.
Must not know: what the processes do, or why the controller wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from headrace.api.messages import (
    LauncherCommand,
    LauncherError,
    ListProcesses,
    ProcessEnded,
    Processes,
    ProcessSpec,
    ProcessStarted,
    ProcessState,
    StartProcess,
    StopProcess,
)
from headrace.clock import Clock, SystemClock
from headrace.fabric.channel import Channel, listen
from headrace.fabric.children import Children
from headrace.fabric.restarts import count_failures, restart_delay_s

SUPERVISOR_SOCKET = "supervisor.sock"
CONTROLLER_NAME = "controller"
CONTROLLER_SILENCE_S = 5.0
"""While stopping, the controller says something every second; after this long it is taken for hung."""
CONTROLLER_HUNG_S = 10.0
"""At other times too; one that says nothing for this long is killed and started again."""
STOOD_STILL_S = 2.0
"""A supervisor whose watch is so late did not run itself, and has heard nobody."""
STOP_GRACE_S = 5.0
"""How long processes may take to end when the supervisor stops them itself."""
_WATCH_INTERVAL_S = 0.25


class Supervisor:
    """Runs the controller and whatever it asks for. `run` returns when no process is left."""

    def __init__(
        self,
        run_directory: Path,
        controller: ProcessSpec,
        on_notice: Callable[[str], None],
        clock: Clock | None = None,
    ) -> None:
        self._run_directory = run_directory
        self._controller = controller
        self._on_notice = on_notice
        self._clock = clock or SystemClock()
        self._children = Children(self._on_exit)
        self._channels: set[Channel] = set()
        self._stop_began_s: float | None = None
        self._is_stopping_all = False
        self._last_word_s = 0.0
        self._watched_s = 0.0
        self._controller_started_s = 0.0
        self._finished = asyncio.Event()
        self.controller_failures = 0
        """Ends of the controller in a row, each before it was healthy for a while."""
        self.controller_last_output = ""

    def __repr__(self) -> str:
        state = "running" if self._stop_began_s is None else "stopping"
        return f"Supervisor({state}, {len(self._children)} processes)"

    async def run(self) -> None:
        """Serve until stopped. Raises OSError if the socket or the controller cannot be had at all."""
        path = str(self._run_directory / SUPERVISOR_SOCKET)
        server = await listen(path, lambda: Channel(LauncherCommand, self._on_command, self._on_close))
        try:
            self._start_controller()
            self._watched_s = self._clock.now_s()
            self._watch_controller()
            await self._finished.wait()
        finally:
            server.close()
            for channel in list(self._channels):
                channel.close()
            self._children.kill_all_and_reap()
            with contextlib.suppress(OSError):
                (self._run_directory / SUPERVISOR_SOCKET).unlink()

    def stop(self, reason: str) -> None:
        """First call: let the controller drain everything and end. Second call: kill everything."""
        if self._stop_began_s is not None:
            self._on_notice("stopping at once")
            self._stop_all(grace_s=0.0)
            return
        self._on_notice(reason)
        self._stop_began_s = self._last_word_s = self._clock.now_s()
        if CONTROLLER_NAME not in self._children:
            self._stop_all(STOP_GRACE_S)
            return
        self._children.signal(CONTROLLER_NAME, self._controller.stop_signal)

    # ---- the controller ----------------

    def _start_controller(self) -> None:
        if self._stop_began_s is None:
            self._controller_started_s = self._last_word_s = self._clock.now_s()
            self._children.start(self._controller)

    def _watch_controller(self) -> None:
        """Kill a controller that says nothing for a while; while stopping, stop the rest ourselves then."""
        if self._finished.is_set() or self._is_stopping_all:
            return
        now_s = self._clock.now_s()
        if now_s - self._watched_s > STOOD_STILL_S:
            self._last_word_s = now_s
        self._watched_s = now_s
        silence_s = now_s - self._last_word_s
        if self._stop_began_s is not None and silence_s > CONTROLLER_SILENCE_S:
            self._on_notice(f"the controller has said nothing for {silence_s:.0f} s: stopping without it")
            self._stop_all(STOP_GRACE_S)
            return
        is_there = CONTROLLER_NAME in self._children
        if is_there and self._stop_began_s is None and silence_s > CONTROLLER_HUNG_S:
            self._on_notice(f"the controller has said nothing for {silence_s:.0f} s: killing it")
            self._last_word_s = now_s
            self._children.kill(CONTROLLER_NAME)
        asyncio.get_running_loop().call_later(_WATCH_INTERVAL_S, self._watch_controller)

    def _on_controller_end(self, exit_code: int | None, last_output: str) -> None:
        if self._stop_began_s is not None or exit_code == 0:
            if self._stop_began_s is None:
                self._stop_began_s = self._clock.now_s()
            self._stop_all(STOP_GRACE_S)
            return
        lived_s = self._clock.now_s() - self._controller_started_s
        self.controller_failures = count_failures(self.controller_failures, lived_s)
        self.controller_last_output = last_output
        delay_s = restart_delay_s(self.controller_failures)
        self._on_notice(f"the controller ended with {exit_code}; starting it again in {delay_s:.1f} s")
        asyncio.get_running_loop().call_later(delay_s, self._restart_controller)

    def _restart_controller(self) -> None:
        try:
            self._start_controller()
        except OSError as error:
            self._on_controller_end(None, str(error))

    # ---- commands ----------------

    def _on_command(self, channel: Channel, command: LauncherCommand) -> None:
        self._channels.add(channel)
        self._last_word_s = self._clock.now_s()
        match command:
            case StartProcess(spec):
                self._on_start(channel, spec)
            case StopProcess(name, grace_s):
                if name == CONTROLLER_NAME or not self._children.stop(name, grace_s):
                    channel.send(LauncherError(name, "no such process"))
            case ListProcesses():
                channel.send(Processes(self._children.states()))

    def _on_start(self, channel: Channel, spec: ProcessSpec) -> None:
        if self._stop_began_s is not None:
            channel.send(LauncherError(spec.name, "the system is stopping"))
        elif spec.name in self._children:
            channel.send(LauncherError(spec.name, "a process of this name is running"))
        else:
            try:
                state = self._children.start(spec)
            except OSError as error:
                channel.send(LauncherError(spec.name, f"{spec.argv[0]} cannot be started: {error}"))
            else:
                channel.send(ProcessStarted(state))

    def _on_close(self, channel: Channel, reason: str) -> None:
        self._channels.discard(channel)

    # ---- children ----------------

    def _on_exit(self, ended: ProcessState) -> None:
        for channel in self._channels:
            channel.send(ProcessEnded(ended))
        if ended.name == CONTROLLER_NAME:
            self._on_controller_end(ended.exit_code, ended.last_output)
        if self._stop_began_s is not None and not self._children:
            self._finished.set()

    def _stop_all(self, grace_s: float) -> None:
        """Stop everything without the controller."""
        self._is_stopping_all = True
        self._children.kill(CONTROLLER_NAME)
        for name in self._children.names():
            self._children.stop(name, grace_s)
        if not self._children:
            self._finished.set()
