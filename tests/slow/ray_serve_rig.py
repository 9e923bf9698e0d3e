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
def running(directory: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of the environment in namespaces; all that it started is gone at the end."""
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


class ServeCluster:
    """A Ray head with its dashboard, to which Serve configs are given as KubeRay and `serve deploy` do."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], url: str, token: str) -> None:
        self.directory, self.process = directory, process
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
        )

    def close(self) -> None:
        self._client.close()

    def deploy(self, config: dict[str, Any]) -> None:
        answer = self._client.put("/api/serve/applications/", json=config)
        assert answer.status_code == 200, answer.text

    def delete(self) -> None:
        answer = self._client.delete("/api/serve/applications/")
        assert answer.status_code == 200, answer.text

    def application(self, name: str) -> dict[str, Any]:
        """What Ray Serve says of the application; empty while it says nothing."""
        with contextlib.suppress(httpx.HTTPError):
            answer = self._client.get("/api/serve/applications/")
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
        with running(directory, *command, **environment) as process:
            cluster = ServeCluster(directory, process, f"http://127.0.0.1:{dashboard}", token)

            def answers() -> bool:
                assert process.poll() is None, log_of(directory)
                with contextlib.suppress(httpx.HTTPError):
                    return cluster._client.get("/api/serve/applications/").status_code == 200
                return False

            wait_until(answers, lambda: log_of(directory), START_LIMIT_S)
            try:
                yield cluster
            finally:
                cluster.close()


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())
