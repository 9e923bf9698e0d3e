"""What becomes of a system when Ray's own head fails, or its controller hangs. A cluster for each test."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest

from headrace.control.cluster_watch import LIMIT_VARIABLE
from tests.cluster.ray_rig import RayCluster, free_port, ray_cluster
from tests.cluster.test_ray_system import Load, System, left_over, pid_of, running, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GONE_LIMIT_S = 90.0
SAY_LIMIT_S = 30.0
NUM_CLIENTS, NUM_TOKENS = 4, 150


def wait_nothing_runs(cluster: RayCluster) -> None:
    """A run directory may be left when Ray kills keepers; the next keeper there empties it."""
    deadline_s = time.monotonic() + GONE_LIMIT_S
    while left := [what for what in left_over(cluster) if not what.startswith("/")]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.2)


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
    with ray_cluster("--num-cpus=2", prepare=impatient) as cluster:
        process, system = attached(cluster)
        assert system.ask().status_code == 200
        killed_s = time.monotonic()
        cluster.head.gcs.kill()
        wait_said(cluster, "does not answer: Connection refused")
        print(f"`up` said so {time.monotonic() - killed_s:.1f} s after the GCS was killed")
        wait_nothing_runs(cluster)
        print(f"nothing was left after {time.monotonic() - killed_s:.1f} s")
        asked_s = time.monotonic()
        status = cluster.headrace("status", RAY_ADDRESS=cluster.address)
        print(f"status said within {time.monotonic() - asked_s:.1f} s: {status.stderr}")
        assert status.returncode == 1
        assert "cannot be reached: Connection refused" in status.stderr
        assert "Traceback" not in status.stderr
        assert process.wait(SAY_LIMIT_S) == 1
        said = (cluster.directory / "up.log").read_text()
        print(f"`up` ended {time.monotonic() - killed_s:.1f} s after: {said.splitlines()[-1]}")
        assert said.splitlines()[-1].startswith(
            f"error: the Ray cluster at {cluster.address} has not answered"
        )
        assert "Traceback" not in said


def impatient(cluster: RayCluster) -> list[str]:
    """Have all of Ray wait for its head for less than a minute."""
    cluster.environment[LIMIT_VARIABLE] = "10"
    return []


def attached(cluster: RayCluster) -> tuple[subprocess.Popen[bytes], System]:
    """A system that a command holds, which is not asked to end it; it ends with the cluster."""
    port = free_port()
    arguments = ["--launcher", "ray", "--address", cluster.address]
    process = cluster.begin("up", str(write_config(cluster, port)), *arguments)
    system = System(cluster, process, port)
    system.wait(lambda status: bool(status["is_ready"]))
    return process, system


def wait_said(cluster: RayCluster, words: str) -> None:
    """Wait until `up` has said this."""
    deadline_s = time.monotonic() + SAY_LIMIT_S
    while words not in (said := (cluster.directory / "up.log").read_text()):
        assert time.monotonic() < deadline_s, said
        time.sleep(0.05)


def with_store(cluster: RayCluster) -> list[str]:
    """Have Ray keep what its GCS knows in files."""
    store = cluster.directory / "store"
    cluster.environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(store)}
    return []


def wait_answers(load: Load, num_more: int) -> None:
    """Wait until so many more streams have ended."""
    wanted, deadline_s = len(load.answers) + num_more, time.monotonic() + 60
    while len(load.answers) < wanted:
        assert time.monotonic() < deadline_s, (wanted, load.answers)
        time.sleep(0.05)


def test_a_gcs_that_is_started_again_with_its_store_finds_all_as_it_was_and_no_stream_is_lost() -> None:
    two = {"replicas": {"min": 2, "max": 4}, "simulated": {"step_ms": 20}}
    with (
        ray_cluster("--num-cpus=2", prepare=with_store) as cluster,
        running(cluster, **two, nodes={"resources": {"CPU": 0.1}}) as system,
    ):
        before = system.status()
        load = Load(system, NUM_CLIENTS, NUM_TOKENS)
        wait_answers(load, NUM_CLIENTS)
        cluster.head.lose_gcs()
        lost_s = time.monotonic()
        wait_said(cluster, "does not answer: Connection refused. What runs serves on")
        wait_answers(load, 2 * NUM_CLIENTS)  # these were begun without it
        assert system.status()["is_ready"]
        psutil.Process(pid_of(before, "controller")).kill()  # the next one finds no cluster yet
        wait_answers(load, 2 * NUM_CLIENTS)
        assert not system.status(), "there is a controller, though it cannot have found its hosts"
        cluster.head.start_gcs()
        started_s = time.monotonic()
        wait_said(cluster, "the Ray cluster answers again, after ")
        after = system.wait(lambda status: bool(status["is_ready"]))
        print(
            f"the GCS was away for {started_s - lost_s:.1f} s; the controller answered "
            f"{time.monotonic() - started_s:.1f} s after its start"
        )
        untouched = {process["name"]: process["pid"] for process in before["processes"]}
        untouched.pop("controller")
        assert {name: pid_of(after, name) for name in untouched} == untouched
        wait_answers(load, NUM_CLIENTS)
        assert cluster.headrace("scale", "chat", "3").returncode == 0
        system.wait(lambda status: status["endpoints"][0]["ready"] == 3)
        answers = load.stop()
        print(f"{len(answers)} answers")
        assert set(answers) == {"whole"}, [answer for answer in answers if answer != "whole"]
