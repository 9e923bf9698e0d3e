"""The supervisor of the simulated system: starts, stops and mourns processes, as `fabric.supervisor` does.

Owns the processes and the restarts of the controller. It is never broken here: with it everything ends.
Must not know what the processes do, or why the controller wants them.
"""

from __future__ import annotations

from collections.abc import Callable

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
from headrace.fabric.restarts import count_failures, restart_delay_s
from headrace.fabric.supervisor import CONTROLLER_NAME, CONTROLLER_SILENCE_S, STOP_GRACE_S
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End
from headrace.sim.timeline import Timer

ADDRESS = "supervisor.sock"
WATCH_INTERVAL_S = 0.25
Spawn = Callable[[ProcessSpec], Process]
"""Makes and starts a process. Raises OSError if it cannot be started."""


class SupervisorProcess(Process):
    """Holds all processes."""

    def __init__(self, registry: Registry, host: Host, spawn: Spawn) -> None:
        super().__init__(registry, "supervisor", host)
        self._spawn = spawn
        self._kills: dict[str, tuple[float, Timer]] = {}
        self._ends: dict[End, None] = {}
        self._controller_failures = 0
        self._controller_started_s = 0.0
        self.children: dict[str, Process] = {}
        self.num_started = 0
        self.is_stopping = False
        self.has_stopped_alone = False
        """It ended all by itself, since its controller was away or said nothing."""
        self._last_word_s = 0.0
        self.refusals_left = 0
        """Starts that fail, as on a machine without memory."""
        self.listen(ADDRESS)

    def begin(self) -> None:
        self._start_controller()

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        end = connection
        self._ends[end] = None
        end.on_message = lambda command: self._on_command(end, command)
        end.on_close = lambda: self._on_closed(end)

    def _on_closed(self, end: End) -> None:
        self._ends.pop(end, None)

    def stop(self) -> None:
        """SIGTERM: let the controller drain everything and end."""
        if self.is_stopping:
            return
        self.is_stopping, self._last_word_s = True, self.timeline.now_s
        controller = self.children.get(CONTROLLER_NAME)
        if controller is None:
            self._stop_all()
        else:
            controller.run(controller.terminate)
            self._watch_controller()

    def _watch_controller(self) -> None:
        if CONTROLLER_NAME not in self.children:
            return
        if self.timeline.now_s - self._last_word_s > CONTROLLER_SILENCE_S:
            self._stop_all()
        else:
            self.after(WATCH_INTERVAL_S, self._watch_controller, "supervisor watch")

    def _stop_all(self, *, is_alone: bool = True) -> None:
        """Stop everything without the controller. is_alone: it has not drained."""
        self.has_stopped_alone = self.has_stopped_alone or is_alone
        self.is_stopping = True
        for name, child in list(self.children.items()):
            if name == CONTROLLER_NAME:
                child.kill()
            else:
                self._stop_child(name, STOP_GRACE_S)

    def _start_controller(self) -> None:
        if self.is_stopping:
            return
        self._controller_started_s = self.timeline.now_s
        self._start(ProcessSpec(CONTROLLER_NAME, []))

    def _on_command(self, end: End, command: LauncherCommand) -> None:
        self._last_word_s = self.timeline.now_s
        match command:
            case StartProcess(spec):
                self._on_start(end, spec)
            case StopProcess(name, grace_s):
                if name == CONTROLLER_NAME or not self._stop_child(name, grace_s):
                    end.send(LauncherError(name, "no such process"))
            case ListProcesses():
                end.send(Processes([self._state(child) for child in self.children.values()]))

    def _on_start(self, end: End, spec: ProcessSpec) -> None:
        if self.is_stopping:
            end.send(LauncherError(spec.name, "the system is stopping"))
        elif spec.name in self.children:
            end.send(LauncherError(spec.name, "a process of this name is running"))
        elif self.refusals_left > 0:
            self.refusals_left -= 1
            end.send(LauncherError(spec.name, "cannot be started: no memory"))
        else:
            end.send(ProcessStarted(self._state(self._start(spec))))

    def _start(self, spec: ProcessSpec) -> Process:
        self.num_started += 1
        child = self._spawn(spec)
        self.children[spec.name] = child
        child.on_exit = self._on_exit
        return child

    def _stop_child(self, name: str, grace_s: float) -> bool:
        child = self.children.get(name)
        if child is None:
            return False
        pending = self._kills.get(name)
        when_s = self.timeline.now_s + grace_s
        if pending is not None:
            if pending[0] <= when_s:
                return True
            pending[1].cancel()
        self._kills[name] = (when_s, self.after(grace_s, child.kill, "supervisor kill"))
        if pending is None and grace_s > 0:
            child.run(child.terminate)
        return True

    def _on_exit(self, child: Process, code: int) -> None:
        delay_s = 0.002
        if child.host is not self.host:
            delay_s = self.random.uniform(0.01, 3.0)  # another machine's end is heard of late
        self.after(delay_s, lambda: self._reap(child, code), "supervisor reaps")

    def _reap(self, child: Process, code: int | None, last_output: str = "") -> None:
        """code: None, nobody saw it end: what held it is gone."""
        if self.children.get(child.name) is not child:
            return
        del self.children[child.name]
        # Here, as in the real one: a stop may have come since the child died, and is not its successor's.
        pending = self._kills.pop(child.name, None)
        if pending is not None:
            pending[1].cancel()
        state = ProcessState(child.name, child.pid, False, code, last_output)
        for end in self._ends:
            end.send(ProcessEnded(state))
        if child.name == CONTROLLER_NAME and (self.is_stopping or code == 0):
            self._stop_all(is_alone=code != 0)
        elif child.name == CONTROLLER_NAME:
            lived_s = self.timeline.now_s - self._controller_started_s
            self._controller_failures = count_failures(self._controller_failures, lived_s)
            self.after(
                restart_delay_s(self._controller_failures), self._start_controller, "controller restart"
            )

    def _state(self, child: Process) -> ProcessState:
        node = "" if child.host is self.host else child.host.name  # a notice is of one machine
        return ProcessState(child.name, child.pid, is_alive=True, node=node)
