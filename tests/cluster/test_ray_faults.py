"""What becomes of a system when Ray's own head fails, or its controller hangs. A cluster for each test."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.cluster.ray_rig import RayCluster, RayNode, free_port, ray_cluster
from tests.cluster.test_ray_system import System, left_over, pid_of, running, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GONE_LIMIT_S = 90.0


@contextlib.contextmanager
def detached(cluster: RayCluster, **endpoint: object) -> Iterator[System]:
    """A system that nobody's command holds; what is left of it afterwards ends with the cluster."""
    port = free_port()
    config = write_config(cluster, port, **endpoint)
    arguments = ["up", str(config), "--launcher", "ray", "--address", cluster.address, "--detach"]
    done = cluster.headrace(*arguments)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(["sleep", "600"])  # in the place of a command: it never ends by itself
    try:
        yield System(cluster, process, port)
    finally:
        process.kill()
        process.wait()


def wait_nothing_runs(cluster: RayCluster) -> None:
    """A run directory may be left when Ray kills keepers; the next keeper there empties it."""
    deadline_s = time.monotonic() + GONE_LIMIT_S
    while left := [what for what in left_over(cluster) if not what.startswith("/")]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.2)


def gcs_of(head: RayNode) -> psutil.Process:
    return next(process for process in head.processes() if "gcs_server" in process.name())


def test_a_controller_that_hangs_is_replaced_and_nothing_else_is_touched() -> None:
    with ray_cluster("--num-cpus=2") as cluster, running(cluster) as system:
        before = system.status()
        stopped_s = time.monotonic()
        psutil.Process(pid_of(before, "controller")).send_signal(signal.SIGSTOP)
        assert system.ask().status_code == 200
        after = system.wait(lambda status: pid_of(status, "controller") != pid_of(before, "controller"))
        print(f"a hung controller was replaced within {time.monotonic() - stopped_s:.1f} s")
        after = system.wait(lambda status: bool(status["is_ready"]))
        for name in ("keeper", "front chat-1", "engine chat-1", "router-g1", "haproxy-g1"):
            assert pid_of(after, name) == pid_of(before, name), name
        assert system.ask().status_code == 200


def test_without_a_store_the_system_ends_with_rays_gcs_and_commands_say_so() -> None:
    with ray_cluster("--num-cpus=2") as cluster, detached(cluster) as system:
        assert system.ask().status_code == 200
        killed_s = time.monotonic()
        gcs_of(cluster.head).kill()
        wait_nothing_runs(cluster)
        print(f"nothing was left {time.monotonic() - killed_s:.1f} s after the GCS was killed")
        asked_s = time.monotonic()
        status = cluster.headrace("status", RAY_ADDRESS=cluster.address)
        print(f"status said within {time.monotonic() - asked_s:.1f} s: {status.stderr}")
        assert status.returncode == 1
        assert "cannot be reached: Connection refused" in status.stderr
        assert "Traceback" not in status.stderr
