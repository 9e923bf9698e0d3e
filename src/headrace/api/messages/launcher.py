"""What a controller asks of the supervisor, and what comes back."""

from __future__ import annotations

from headrace.api.messages.base import Message, Record


class ProcessSpec(Record, frozen=True):
    """One child process. It dies with its supervisor."""

    name: str
    """Unique among live processes: `router`, `haproxy`, `chat-1`."""
    argv: list[str]
    environment: dict[str, str] = {}
    log_path: str = ""
    """Where stdout and stderr go; empty: inherited."""
    stop_signal: int = 15


class ProcessState(Record, frozen=True):
    """A process that the supervisor holds, or one that ended."""

    name: str
    pid: int
    is_alive: bool
    exit_code: int | None = None
    """Negative: the signal that ended it."""
    last_output: str = ""
    """The last lines of its log, after its end."""


class StartProcess(Message, frozen=True):
    spec: ProcessSpec


class StopProcess(Message, frozen=True):
    """Send the stop signal; after grace_s kill the whole process group."""

    name: str
    grace_s: float


class ListProcesses(Message, frozen=True):
    pass


LauncherCommand = StartProcess | StopProcess | ListProcesses


class Processes(Message, frozen=True):
    """All live processes: the answer to ListProcesses."""

    processes: list[ProcessState]


class ProcessStarted(Message, frozen=True):
    process: ProcessState


class ProcessEnded(Message, frozen=True):
    process: ProcessState


class LauncherError(Message, frozen=True):
    name: str
    error: str


LauncherEvent = Processes | ProcessStarted | ProcessEnded | LauncherError
