"""`python -m headrace.fabric.keeper FD RUN_DIR NAME`: holds the processes of one host for its actor.

An actor's process has many threads and cannot fork as `headrace.fabric.child` needs it: so it has this child.
Owns the processes, their restarts, and a part in the host's run directory. Ends, and everything with it, when
the socket `FD` closes: the actor died, was killed, or lost its node. Must not know: Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
from setproctitle import setproctitle

from headrace.api.messages import (
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
from headrace.api.run_paths import (
    HOST_PLACEHOLDER,
    IDENTITY_FILE,
    IDENTITY_PLACEHOLDER,
    KEEPER_PLACEHOLDER,
    NODE_PLACEHOLDER,
    PYTHON_PLACEHOLDER,
    RUN_DIR_PLACEHOLDER,
)
from headrace.fabric.channel import Channel
from headrace.fabric.children import Children
from headrace.fabric.cluster_identity import keep_identity
from headrace.fabric.heartbeat import Heartbeats
from headrace.fabric.host_messages import (
    CONTROLLER_GROUP,
    HostCommand,
    HostEvent,
    JoinSystem,
    SetTunnels,
    TunnelsOpened,
)
from headrace.fabric.host_tunnels import HostTunnels
from headrace.fabric.restarts import MAX_RESTART_DELAY_S, count_failures, restart_delay_s
from headrace.fabric.run_directory import RunDirectoryError
from headrace.fabric.shared_run_directory import SharedRunDirectory

LOOPBACK = "127.0.0.1"
NICENESS_VARIABLE = "RAY_worker_niceness"


def localize(spec: ProcessSpec, values: Mapping[str, str]) -> ProcessSpec:
    """Return `spec` with what this host has in the places that stand for it. Pure."""

    def put(text: str) -> str:
        for placeholder, value in values.items():
            text = text.replace(placeholder, value)
        return text

    return msgspec.structs.replace(
        spec,
        argv=[put(argument) for argument in spec.argv],
        environment={name: put(value) for name, value in spec.environment.items()},
        log_path=put(spec.log_path),
    )


class Keeper:
    """Holds processes until the other side of `connection` is gone."""

    def __init__(self, run_directory: SharedRunDirectory, *, is_controllers: bool = False) -> None:
        """is_controllers: its host actor is the controller's, which no launcher follows: it leaves the
        tunnels of its machine to others, of which there are some wherever there is a gateway."""
        self._is_controllers = is_controllers
        self._run_directory = run_directory
        self._children = Children(self._on_ended)
        self._restarted: dict[str, ProcessSpec] = {}
        self._failures: dict[str, int] = {}
        self._started_s: dict[str, float] = {}
        self._stopping: set[str] = set()
        self._heartbeats = Heartbeats()
        self._gone = asyncio.Event()
        self._channel = Channel(HostCommand, self._on_command, self._on_close)
        self._values = {
            RUN_DIR_PLACEHOLDER: str(run_directory.path),
            PYTHON_PLACEHOLDER: sys.executable,
            HOST_PLACEHOLDER: LOOPBACK,
            IDENTITY_PLACEHOLDER: "",
            NODE_PLACEHOLDER: LOOPBACK,
            KEEPER_PLACEHOLDER: secrets.token_hex(8),
        }
        self._tunnels = HostTunnels(run_directory.path, self._say)
        self._tunneling: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Keeper({self._run_directory.path}, {self._children})"

    async def run(self, connection: socket.socket) -> None:
        """Obey until the connection closes; nothing is left afterwards."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._channel, sock=connection)
        self._say(Processes([]))
        watching = asyncio.create_task(self._watch_heartbeats())
        try:
            await self._gone.wait()
        finally:
            watching.cancel()
            self._children.kill_all_and_reap()
            if self._tunneling is not None:
                self._tunneling.cancel()
                await asyncio.gather(self._tunneling, return_exceptions=True)

    def _on_command(self, channel: Channel, command: HostCommand) -> None:
        match command:
            case StartProcess(spec):
                self._on_start(localize(spec, self._values))
            case StopProcess(name, grace_s):
                self._stopping.add(name)
                if not self._children.stop(name, grace_s) and not self._was_waiting(name):
                    self._stopping.discard(name)
                    self._say(LauncherError(name, "no such process"))
            case ListProcesses():
                self._say(Processes(self._children.states()))
            case JoinSystem():
                self._join(command)
            case SetTunnels():
                self._tunnels.set(command)

    def _join(self, command: JoinSystem) -> None:
        self._values[NODE_PLACEHOLDER] = command.address
        path = self._run_directory.path / IDENTITY_FILE
        try:
            keep_identity(command.membership.identity, path)
        except OSError as error:
            self._say(TunnelsOpened("", f"{path}: {error}"))
            return
        if command.address != command.membership.home:
            self._values |= {HOST_PLACEHOLDER: command.address, IDENTITY_PLACEHOLDER: str(path)}
        if not self._is_controllers:
            self._tunneling = asyncio.create_task(self._tunnels.run(command.address))
            self._tunneling.add_done_callback(self._on_tunnels_broken)

    def _on_tunnels_broken(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():  # our own bug; what runs here goes on, and somebody hears of it
            self._say(TunnelsOpened("", f"the tunnels broke: {task.exception()!r}"))

    def _on_start(self, spec: ProcessSpec) -> None:
        if spec.name in self._children or spec.name in self._restarted:
            self._say(LauncherError(spec.name, "a process of this name is running"))
            return
        try:
            self._write_files(spec)
            self._start(spec)
        except OSError as error:
            self._say(LauncherError(spec.name, f"{spec.argv[0]} cannot be started: {error}"))
            return
        if spec.is_restarted:
            self._restarted[spec.name] = spec

    def _start(self, spec: ProcessSpec) -> None:
        state = self._children.start(spec)
        now_s = self._started_s[spec.name] = asyncio.get_running_loop().time()
        if spec.heartbeat_file:
            self._heartbeats.watch(spec.name, self._run_directory.path / spec.heartbeat_file, now_s)
        self._say(ProcessStarted(state))

    async def _watch_heartbeats(self) -> None:
        """Kill what hangs: it is started again as if it had ended by itself."""
        while True:
            await asyncio.sleep(Heartbeats.LOOK_S)
            for name, silent_s in self._heartbeats.hung(asyncio.get_running_loop().time()).items():
                self._heartbeats.forget(name)
                self._note_in_log(name, f"{name} has been silent for {silent_s:.0f} s: its keeper kills it")
                self._children.kill(name)

    def _note_in_log(self, name: str, text: str) -> None:
        spec = self._restarted.get(name)
        with contextlib.suppress(OSError):
            if spec is not None and spec.log_path:
                with open(spec.log_path, "a", encoding="utf-8") as log:
                    log.write(f"{text}\n")

    def _was_waiting(self, name: str) -> bool:
        """Whether `name` waited for its next start, which now is not to come."""
        if self._restarted.pop(name, None) is None:
            return False
        self._say(ProcessEnded(ProcessState(name, 0, False)))
        return True

    def _on_ended(self, ended: ProcessState) -> None:
        name = ended.name
        lived_s = asyncio.get_running_loop().time() - self._started_s.pop(name)
        self._heartbeats.forget(name)
        spec = self._restarted.get(name)
        self._say(ProcessEnded(ended))
        if spec is None or name in self._stopping or ended.exit_code == 0:
            self._restarted.pop(name, None)
            self._stopping.discard(name)
            return
        self._failures[name] = count_failures(self._failures.get(name, 0), lived_s)
        delay_s = restart_delay_s(self._failures[name])
        asyncio.get_running_loop().call_later(delay_s, self._restart, name)

    def _restart(self, name: str) -> None:
        spec = self._restarted.get(name)
        if spec is None or self._gone.is_set():
            return
        try:
            self._start(spec)
        except OSError as error:
            self._say(LauncherError(name, str(error)))
            asyncio.get_running_loop().call_later(MAX_RESTART_DELAY_S, self._restart, name)

    def _write_files(self, spec: ProcessSpec) -> None:
        for name, text in spec.files.items():
            path = self._run_directory.path / name
            if not path.exists():
                path.parent.mkdir(mode=0o700, exist_ok=True)
                with open(path, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                    file.write(text)

    def _say(self, event: HostEvent) -> None:
        self._channel.send(event)

    def _on_close(self, channel: Channel, reason: str) -> None:
        self._gone.set()


def take_usual_priority() -> None:
    """Leave the niceness of 15 that Ray gives its workers, where we may: who serves must not come behind
    everything else of the machine. RAY_worker_niceness, if somebody set it, stands."""
    if NICENESS_VARIABLE not in os.environ:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)


def main() -> int:
    fd, path, name = sys.argv[1:]
    take_usual_priority()
    setproctitle(f"headrace: keeper {name}")
    connection = socket.socket(fileno=int(fd))
    try:
        run_directory = SharedRunDirectory.join(Path(path))
    except (RunDirectoryError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    try:
        keeper = Keeper(run_directory, is_controllers=name == CONTROLLER_GROUP)
        asyncio.run(keeper.run(connection))
    finally:
        run_directory.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
