"""A real Ray cluster for tests: small, with a token, ports and files of its own. Ends by processes' ids.

`ray stop` is never used: it ends every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
START_LIMIT_S = 90.0
SMALL = ["--object-store-memory=80000000"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
REMOVE_GROUP = """
import sys
import ray
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray._raylet import PlacementGroupID
ray.init(address=sys.argv[1], log_to_driver=False)
(found,) = [
    group for group, entry in placement_group_table().items()
    if entry["name"].startswith(sys.argv[2]) and entry["state"] == "CREATED"
]
remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(found))))
"""
HEADRACE = [sys.executable, "-m", "headrace"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RayNode:
    """One `ray start --block` with everything below it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._gcs_command: tuple[list[str], dict[str, str]] | None = None
        self._gcs: subprocess.Popen[bytes] | None = None

    @property
    def gcs(self) -> psutil.Process:
        """What holds the cluster, on a head."""
        return next(process for process in self.processes() if "gcs_server" in process.name())

    def lose_gcs(self) -> None:
        """Kill it alone, for `start_gcs`. `ray start --block` would end the node then, so it is held: where a
        GCS is started again, who does it is not this command."""
        gcs = self.gcs
        self._gcs_command = gcs.cmdline(), gcs.environ()
        self._process.send_signal(signal.SIGSTOP)
        gcs.kill()

    def start_gcs(self) -> None:
        """As it was started the first time."""
        assert self._gcs_command is not None
        argv, environment = self._gcs_command
        self._gcs = subprocess.Popen(
            argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def processes(self) -> list[psutil.Process]:
        """It, and all that it started, hosts and what they hold included."""
        try:
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """As a machine goes: everything of Ray at the same moment. Keepers see it and end what they hold."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if (
                    "keeper" not in process.name()
                    and "ray" in " ".join(process.cmdline()[:1]) + process.name()
                ):
                    process.kill()
        if self._gcs is not None:
            self._gcs.kill()
            self._gcs.wait(30)
        self._process.kill()
        self._process.wait(30)

    def stop(self) -> None:
        if self._gcs_command is not None:  # it is held, and hears no signal but this
            self.kill()
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


class RayCluster:
    """A head, and nodes that tests add."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else a node that is told to end waits for 30 s
            "PYTHONPATH": f"{REPOSITORY / 'src'}",
            "TMPDIR": str(directory),
            "XDG_STATE_HOME": str(directory / "state"),
        }
        self._nodes: list[RayNode] = []

    def start_head(self, *options: str) -> RayNode:
        port, num_before = self.address.rpartition(":")[2], self._num_started()
        head = ("--head", f"--port={port}", "--include-dashboard=false")
        node = self.head = self._start(*head, *options)
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(port)), 1.0).close()
                if self._num_started() > num_before:
                    return node
            assert time.monotonic() < deadline_s, (self.directory / "ray.log").read_text()
            time.sleep(0.1)

    def add_node(self, *options: str) -> RayNode:
        """Return a node that the cluster knows."""
        num_before = self._num_started()
        node = self._start(f"--address={self.address}", *options)
        deadline_s = time.monotonic() + START_LIMIT_S
        while self._num_started() == num_before:
            assert time.monotonic() < deadline_s, (self.directory / "ray.log").read_text()
            time.sleep(0.1)
        return node

    def _num_started(self) -> int:
        log = self.directory / "ray.log"
        return log.read_text().count("Ray runtime started") if log.exists() else 0

    def headrace(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of headrace to its end."""
        return subprocess.run(
            [*HEADRACE, *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=90,
        )

    def remove_placement_group(self, name: str) -> None:
        """As somebody with Ray's own tools might: the one whose name begins so."""
        done = subprocess.run(
            [sys.executable, "-c", REMOVE_GROUP, self.address, name],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    def drain_node(self, node_id: str, deadline_s: int) -> None:
        """As an operator, or who takes spot machines away, tells Ray: it goes in so many seconds."""
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test"]
        done = subprocess.run(
            [
                *(*RAY, "drain-node", f"--address={self.address}", f"--node-id={node_id}"),
                *(*reason, f"--deadline-remaining-seconds={deadline_s}"),
            ],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of headrace; what it says is in up.log."""
        with open(self.directory / "up.log", "wb") as log:
            return subprocess.Popen(
                [*HEADRACE, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.stop()

    def _start(self, *options: str) -> RayNode:
        with open(self.directory / "ray.log", "ab") as log:
            process = subprocess.Popen(
                [*RAY, "start", "--block", "--disable-usage-stats", *SMALL, *options],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._nodes.append(RayNode(process))
        return self._nodes[-1]


@contextlib.contextmanager
def ray_cluster(
    *head_options: str, prepare: Callable[[RayCluster], list[str]] = lambda cluster: []
) -> Iterator[RayCluster]:
    """A running cluster; at the end nothing of it is left. prepare: what else is to be done before its start,
    and the options that come of it."""
    directory = Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))
    cluster = RayCluster(directory)
    try:
        cluster.start_head(*head_options, *prepare(cluster))
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
