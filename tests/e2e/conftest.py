"""The whole system, started the way a user starts it: `headrace up`, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll an observable condition until it is true; the error says what was waited for."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s} s still not: {what}")
        time.sleep(0.02)


class RunningSystem:
    """`headrace up` as a child process, in its own runtime directory. prefix: words before its command."""

    def __init__(self, runtime_dir: Path, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.runtime_dir = runtime_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.environment = self.environment_of(runtime_dir)
        self.log = runtime_dir / "up.log"
        self.command_prefix: Sequence[str] = ()
        """Words before each other command about it."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *prefix,
                    *(sys.executable, "-m", "headrace", "up"),
                    *arguments,
                    *("--set", f"gateway.bind=127.0.0.1:{self.port}"),
                ],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
            )

    @staticmethod
    def environment_of(runtime_dir: Path) -> dict[str, str]:
        return {
            **os.environ,
            "XDG_RUNTIME_DIR": str(runtime_dir),
            "XDG_STATE_HOME": str(runtime_dir / "state"),
            "TMPDIR": str(runtime_dir),
            "PYTHONPATH": str(ROOT / "src"),
        }

    def command(self, *arguments: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
        """Run one `headrace` command against this system."""
        return subprocess.run(
            [*self.command_prefix, sys.executable, "-m", "headrace", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
        )

    def status(self) -> dict[str, Any]:
        """`headrace status --json`, or an empty mapping while the controller does not answer."""
        result = self.command("status", "--json")
        if result.returncode != 0:
            return {}
        status: dict[str, Any] = json.loads(result.stdout)
        return status

    def wait_ready(self, timeout_s: float = 60) -> dict[str, Any]:
        def is_ready() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"headrace up ended:\n{self.log.read_text()}"
            status = self.status()
            return status if status.get("is_ready") else None

        try:
            status: dict[str, Any] = wait_until(is_ready, timeout_s, "the system is ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}\n{self.logs()}") from None
        return status

    def logs(self) -> str:
        """The last lines of every process's log."""
        return "\n".join(
            f"---- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.runtime_dir.rglob("logs/*.log"))
        )

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def find_process(self, title: str) -> psutil.Process:
        """The process whose title begins with `title` (or whose program is HAProxy's)."""
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    return process
        raise AssertionError(f"no process {title!r} among {self.titles()}")

    def titles(self) -> list[str]:
        titles = []
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                titles.append(" ".join(process.cmdline()) or process.name())
        return titles

    def interrupt(self, timeout_s: float = 40) -> int:
        """Ctrl-C; return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


@contextlib.contextmanager
def running(config: str, directory: Path) -> Iterator[RunningSystem]:
    """A system with this config, a YAML text, from when it is ready to the end of the block."""
    path = directory / "config.yaml"
    path.write_text(config)
    system = RunningSystem(directory, str(path))
    try:
        system.wait_ready()
        yield system
    finally:
        system.close()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    """The quickstart config: SmolLM2 on two replicas."""
    system = RunningSystem(tmp_path_factory.mktemp("run"), str(QUICKSTART))
    try:
        system.wait_ready()
        yield system
    finally:
        system.close()
