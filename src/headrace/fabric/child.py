"""One child process: started so that it dies with us, watched through a pidfd, stopped with a deadline.

Owns fork, exec, signals and the log's tail. Must run in the main thread of a process without other threads:
PDEATHSIG follows the thread that forked (prctl(2)), and Python code runs between fork and exec.
Must not know: what the process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from headrace.api.messages import ProcessSpec, ProcessState
from headrace.lifetime import PR_SET_PDEATHSIG

MAX_LOG_BYTES = 16 * 1024 * 1024
"""A log longer than this is set aside as NAME.log.1 at the next start of its process."""
TAIL_BYTES = 4096
TAIL_LINES = 15
_NR_PIDFD_OPEN = 434
_EXIT_NO_PARENT = 250


def death_with_parent(death_signal: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Return what a child calls between fork and exec, so that the kernel ends it when its parent ends.

    The setting survives exec, not fork: grandchildren need their own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(_EXIT_NO_PARENT)

    return prepare


class Child:
    """A started process and its group. Born running; `reap` once its pidfd is readable."""

    def __init__(self, spec: ProcessSpec) -> None:
        """Start it. Raises OSError when the program cannot be started."""
        self.spec = spec
        self._log_start, log = _open_log(spec.log_path)
        try:
            self._process = subprocess.Popen(
                spec.argv,
                env={**os.environ, **spec.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only the supervisor; the group can be killed whole
                preexec_fn=death_with_parent(),
            )
        finally:
            if log is not None:
                os.close(log)
        self.pid = self._process.pid
        self.pidfd = _open_pidfd(self.pid)

    def __repr__(self) -> str:
        return f"Child({self.spec.name}, pid {self.pid})"

    def state(self) -> ProcessState:
        return ProcessState(self.spec.name, self.pid, is_alive=True)

    def signal(self, number: int) -> None:
        """Send a signal to the process itself."""
        with contextlib.suppress(ProcessLookupError):  # until it is reaped, nobody else can have its id
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill the process and everything it started in its group. Only before `reap`: its id is ours."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> ProcessState:
        """Collect an ended process, after killing what is left of its group. Call when pidfd is readable."""
        self.kill_group()  # the zombie still holds the group's id, so this cannot hit a stranger
        exit_code = self._process.wait()
        os.close(self.pidfd)
        return ProcessState(self.spec.name, self.pid, False, exit_code, self._tail())

    def _tail(self) -> str:
        """The last lines that this run wrote, without those of earlier runs."""
        if not self.spec.log_path:
            return ""
        try:
            with open(self.spec.log_path, "rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - TAIL_BYTES))
                text = log.read(TAIL_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-TAIL_LINES:])


def _open_pidfd(pid: int) -> int:
    """pidfd_open(2). Some Python builds lack the wrapper because their kernel headers were older."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    fd = ctypes.CDLL(None, use_errno=True).syscall(_NR_PIDFD_OPEN, pid, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_open failed; headrace needs Linux 5.3 or newer")
    return int(fd)


def _open_log(log_path: str) -> tuple[int, int | None]:
    """Return where this run's output begins in its log, and the open log; None: there is to be none.

    Where a full disk takes no new file, the output is lost: a process that cannot log is better than none.
    """
    if not log_path:
        return 0, None
    try:
        start = _rotate(Path(log_path))
        return start, os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        return 0, os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _rotate(path: Path) -> int:
    """Set a long log aside. Returns where this run's output begins in the log. Raises OSError."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return 0
    if size <= MAX_LOG_BYTES:
        return size
    path.replace(path.with_name(path.name + ".1"))
    return 0
