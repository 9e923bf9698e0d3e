"""A Ray with Ray Serve of its own, in the environment that `make test-slow` makes for it.

Its processes are in namespaces (pids, mounts, shared memory), so they end with the first of them and meet no
other Ray of the machine. The network is the machine's: ports are free ones.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from tests.e2e.conftest import ROOT, free_port

BIN = ROOT / ".peers" / "ray-serve" / "bin"
START_LIMIT_S = 240.0
START_ATTEMPTS = 3
APPLICATIONS = "/api/serve/applications/"
"""Of Ray's dashboard: where KubeRay puts its config, too."""
IN_NAMESPACES = ["unshare", "--pid", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"]


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for those of Ray's sockets: 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def running(
    directory: Path, *command: str, is_up: Callable[[], bool], **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of the environment that starts a Ray, up; all that it started is gone at the end. Ray gives
    its own start up after 30 s, which a busy machine takes: then it is tried again."""
    for attempts_left in reversed(range(START_ATTEMPTS)):
        with _process(directory, *command, **environment) as process:
            if _wait_until_up(directory, process, is_up, may_give_up=attempts_left > 0):
                yield process
                return


def _wait_until_up(
    directory: Path, process: subprocess.Popen[bytes], is_up: Callable[[], bool], *, may_give_up: bool
) -> bool:
    """Whether it is up; if it may, it gives its start up."""
    deadline_s = time.monotonic() + START_LIMIT_S
    while not is_up():
        if process.poll() is not None:
            assert may_give_up, log_of(directory)
            assert "timed out during startup" in log_of(directory), log_of(directory)
            return False
        assert time.monotonic() < deadline_s, log_of(directory)
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def _process(directory: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(
            [*IN_NAMESPACES, str(BIN / command[0]), *command[1:]],
            cwd=directory,
            env={**clean, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(directory), **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_of(directory: Path) -> str:
    return (directory / "log").read_text(errors="replace")[-3000:]


def wait_until(condition: Callable[[], Any], explain: Callable[[], object], limit_s: float) -> Any:
    """Return what `condition` gives once that is true."""
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not within {limit_s:g} s: {explain()}"
        time.sleep(0.2)
    return found


def client_of(url: str, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)


class ServeCluster:
    """A Ray head with its dashboard, to which Serve configs are given as KubeRay and `serve deploy` do."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], client: httpx.Client) -> None:
        self.directory, self.process = directory, process
        self._client = client

    def deploy(self, config: dict[str, Any]) -> None:
        answer = self._client.put(APPLICATIONS, json=config)
        assert answer.status_code == 200, answer.text

    def delete(self) -> None:
        answer = self._client.delete(APPLICATIONS)
        assert answer.status_code == 200, answer.text

    def application(self, name: str) -> dict[str, Any]:
        """What Ray Serve says of the application; empty while it says nothing."""
        with contextlib.suppress(httpx.HTTPError):
            answer = self._client.get(APPLICATIONS)
            if answer.status_code == 200:
                return dict(answer.json()["applications"].get(name, {}))
        return {}

    def processes(self, name: str) -> list[psutil.Process]:
        """Those below it whose title begins with `name`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
        return found


@contextlib.contextmanager
def serve_cluster() -> Iterator[ServeCluster]:
    with short_directory() as directory:
        port, dashboard, token = free_port(), free_port(), secrets.token_hex(32)
        command = (
            *("ray", "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"),
            *(f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={free_port()}",
            "--object-store-memory=80000000",
        )
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "PYTHONPATH": str(ROOT / "src"),
            "TMPDIR": str(directory),
            "XDG_STATE_HOME": str(directory / "state"),
        }
        with client_of(f"http://127.0.0.1:{dashboard}", token) as client:

            def answers() -> bool:
                with contextlib.suppress(httpx.HTTPError):
                    return client.get(APPLICATIONS).status_code == 200
                return False

            with running(directory, *command, is_up=answers, **environment) as process:
                yield ServeCluster(directory, process, client)


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())
