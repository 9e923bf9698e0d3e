"""A Ray cluster of the benchmark's own, and a system on it, asked from outside.

Owns their lives. The benchmarks that use it run in namespaces (`benchmarks.namespaces`), where a Ray disturbs
nobody and leaves nothing. Must not know what is measured.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from tests.cluster.ray_rig import RayCluster, free_port, ray_cluster

from benchmarks.report import Skipped
from benchmarks.system import ENDPOINT
from headrace.api.config_loader import parse_config
from headrace.api.messages import AdminCommand, AdminReply, ApplyConfig, GetStatus, SystemStatus
from headrace.control.admin import NotRunning, ask

READY_LIMIT_S = 120.0
STOP_LIMIT_S = 60.0
_POLL_S = 0.02


class ClusterSystem:
    """A system on a Ray cluster, from outside."""

    def __init__(self, cluster: RayCluster, process: subprocess.Popen[bytes], config: dict[str, Any]) -> None:
        self.cluster, self.process = cluster, process
        self.config = config
        self.url = f"http://{config['gateway']['bind']}/v1"

    def ask(self, command: AdminCommand, limit_s: float = 10.0) -> AdminReply:
        """Ask its controller, as the CLI does. Raises NotRunning."""
        for path in self.cluster.directory.glob("headrace-*/ray-*"):
            return ask(path, command, limit_s)
        raise NotRunning("the system has no run directory")

    def status(self) -> SystemStatus:
        """Return a snapshot. Raises NotRunning while no controller answers."""
        status = self.ask(GetStatus()).status
        assert status is not None
        return status

    def resize(self, replicas: int) -> None:
        """Have so many replicas, whatever the load asks for. Raises NotRunning or CommandRefused."""
        self.config["endpoints"][ENDPOINT]["replicas"] = replicas
        self.ask(ApplyConfig(parse_config(self.config).model_dump_json()))

    def wait(
        self, condition: Callable[[SystemStatus], bool], what: str, limit_s: float = READY_LIMIT_S
    ) -> SystemStatus:
        """Poll until the status is as wanted. Raises RuntimeError."""
        deadline_s = time.monotonic() + limit_s
        status = None
        while time.monotonic() < deadline_s:
            with suppress(NotRunning):
                status = self.status()
                if condition(status):
                    return status
            time.sleep(_POLL_S)
        seen = (
            [f"{r.replica_id} {r.state} {r.phase} {r.last_error}" for r in status.replicas] if status else []
        )
        raise RuntimeError(f"not within {limit_s:g} s: {what}; replicas: {seen}")

    def wait_ready(self, replicas: int) -> SystemStatus:
        """Wait until so many replicas serve, and no others are there."""
        return self.wait(
            lambda status: (
                status.is_ready
                and len(status.replicas) == replicas
                and all(replica.state == "ready" for replica in status.replicas)
            ),
            f"{replicas} replicas are ready",
        )


@contextmanager
def started_cluster(*head_options: str) -> Iterator[RayCluster]:
    """Yield a running Ray cluster of this machine. Raises Skipped when ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise Skipped("ray is not installed: pip install headrace[ray]") from None
    with ray_cluster(*head_options) as cluster:
        yield cluster


def head_pid_of(cluster: RayCluster) -> int:
    """Return the process that all others of the cluster's head are below, hosts and what they hold too."""
    port = cluster.address.rpartition(":")[2]
    [head] = [child for child in psutil.Process().children() if f"--port={port}" in child.cmdline()]
    return head.pid


@contextmanager
def cluster_system(cluster: RayCluster, endpoint: dict[str, Any]) -> Iterator[ClusterSystem]:
    """Start a system of one endpoint with `headrace up --launcher ray`; at the end stop it as Ctrl-C does."""
    port = free_port()
    path = cluster.directory / "config.yaml"
    config = {"endpoints": {ENDPOINT: endpoint}, "gateway": {"bind": f"127.0.0.1:{port}"}}
    path.write_text(json.dumps(config))
    process = cluster.begin("up", str(path), "--launcher", "ray", "--address", cluster.address)
    system = ClusterSystem(cluster, process, config)
    try:
        system.wait(lambda status: status.is_ready, "the system serves")
        yield system
    except RuntimeError as error:
        said = (cluster.directory / "up.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{error}; headrace up: {said}") from error
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the cluster ends next, and all that it holds
            process.wait()
