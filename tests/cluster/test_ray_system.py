"""A whole system on a real Ray cluster: it serves, survives what Ray's parts do, and leaves nothing.

One cluster for the module; tests leave it as they found it. `make cluster` gives it namespaces of its own.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from headrace.api.messages import GetStatus
from headrace.control.admin import NotRunning, ask
from tests.cluster.ray_rig import RayCluster, free_port, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
READY_LIMIT_S = 90.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster("--num-cpus=2", "--labels=kind=head") as running:
        yield running


class System:
    """A system under test, from outside."""

    def __init__(self, cluster: RayCluster, process: subprocess.Popen[bytes], port: int) -> None:
        self.cluster, self.process, self.port = cluster, process, port

    def status(self) -> dict[str, Any]:
        """As `headrace status --json`, without the start of a process each time."""
        for path in self.cluster.directory.glob("headrace-*/ray-*"):
            with contextlib.suppress(NotRunning):
                reply = ask(path, GetStatus(), limit_s=2.0)
                return msgspec.json.decode(msgspec.json.encode(reply.status))
        return {}

    def ask(self) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "chat", "max_tokens": 4, "temperature": 0, "messages": messages}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=60)

    def wait(
        self, condition: Callable[[dict[str, Any]], bool], limit_s: float = READY_LIMIT_S
    ) -> dict[str, Any]:
        deadline_s = time.monotonic() + limit_s
        while True:
            status = self.status()
            if status and condition(status):
                return status
            assert self.process.poll() is None, (self.cluster.directory / "up.log").read_text()
            assert time.monotonic() < deadline_s, self.explain(status)
            time.sleep(0.1)

    def explain(self, status: dict[str, Any]) -> str:
        """What somebody who looks into a failure wants to see."""
        seen = json.dumps({name: status.get(name) for name in ("replicas", "nodes", "rollouts", "endpoints")})
        logs = [
            log.read_text()[-3000:] for log in self.cluster.directory.glob("headrace-*/*/logs/controller.log")
        ]
        return "\n".join([seen, *logs])

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, (self.cluster.directory / "up.log").read_text()


def write_config(
    cluster: RayCluster, port: int, gateway: dict[str, object] | None = None, **endpoint: object
) -> Path:
    chat = {
        "model": "smollm2-135m-instruct",
        "engine": "simulated",
        "replicas": {"min": 1, "max": 4},
        **endpoint,
    }
    path = cluster.directory / "config.yaml"
    address = {"bind": f"127.0.0.1:{port}", **(gateway or {})}
    path.write_text(json.dumps({"endpoints": {"chat": chat}, "gateway": address}))
    return path


@contextmanager
def running(
    cluster: RayCluster, gateway: dict[str, object] | None = None, **endpoint: object
) -> Iterator[System]:
    """A system that serves; it is stopped at the end, and then nothing of it is left."""
    port = free_port()
    config = write_config(cluster, port, gateway, **endpoint)
    process = cluster.begin("up", str(config), "--launcher", "ray", "--address", cluster.address)
    system = System(cluster, process, port)
    try:
        system.wait(lambda status: bool(status["is_ready"]))
        yield system
        system.interrupt()
        deadline_s = time.monotonic() + 10
        while left := left_over(cluster):
            assert time.monotonic() < deadline_s, left
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.kill()
            cluster.headrace("down", "--now", "--address", cluster.address)
            process.wait(30)


def left_over(cluster: RayCluster) -> list[str]:
    processes = [
        process.info["name"]
        for process in psutil.process_iter(["name", "status"])
        if process.info["name"].startswith("headrace") and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
    return processes + [str(path) for path in cluster.directory.glob("headrace-*/*")]


def pid_of(status: dict[str, Any], name: str) -> int:
    """0: there is none now."""
    return next((process["pid"] for process in status["processes"] if process["name"] == name), 0)


def titled(title: str) -> psutil.Process:
    """The process of this title."""
    processes = psutil.process_iter(["cmdline"])  # so read, those that end meanwhile are none
    (found,) = [process for process in processes if (process.info["cmdline"] or [])[:1] == [title]]
    return found


def test_a_system_serves_scales_and_leaves_nothing(cluster: RayCluster) -> None:
    with running(cluster) as system:
        assert system.ask().status_code == 200
        status = system.status()
        assert [node["replicas"] for node in status["nodes"]] == [["chat-1"]]
        assert status["replicas"][0]["node"] == status["nodes"][0]["node_id"]
        again = cluster.headrace(
            "up", str(cluster.directory / "config.yaml"), "--launcher", "ray", "--address", cluster.address
        )
        assert again.returncode == 1
        assert "a system called 'default' already runs on this cluster" in again.stderr
        assert cluster.headrace("scale", "chat", "2").returncode == 0
        system.wait(lambda status: status["endpoints"][0]["ready"] == 2)
        assert cluster.headrace("scale", "chat", "1").returncode == 0
        system.wait(lambda status: len(status["replicas"]) == 1)
        assert system.ask().status_code == 200


def test_what_dies_is_replaced_and_nothing_healthy_is_touched(cluster: RayCluster) -> None:
    with running(cluster) as system:
        before = system.status()
        psutil.Process(pid_of(before, "controller")).kill()
        after = system.wait(lambda status: pid_of(status, "controller") != pid_of(before, "controller"))
        after = system.wait(lambda status: bool(status["is_ready"]))
        keeper = psutil.Process(pid_of(after, "keeper"))
        actor = keeper.parent()
        assert actor is not None
        actor.kill()
        system.wait(lambda status: pid_of(status, "keeper") != keeper.pid)
        after = system.wait(lambda status: bool(status["is_ready"]))
        for name in ("front chat-1", "engine chat-1", "router-g1", "haproxy-g1"):
            assert pid_of(after, name) == pid_of(before, name), name
        assert system.ask().status_code == 200
        host = psutil.Process(pid_of(after, "front chat-1")).parent()
        assert host is not None
        killed_s, killed = time.monotonic(), host.parent()
        assert killed is not None
        killed.kill()
        status = system.wait(lambda status: pid_of(status, "front chat-1") != pid_of(after, "front chat-1"))
        print(f"a killed host was noticed within {time.monotonic() - killed_s:.2f} s")
        assert "The actor is dead" in status["replicas"][0]["last_error"]
        system.wait(lambda status: bool(status["is_ready"]))
        assert system.ask().status_code == 200
        cluster.remove_placement_group("headrace-default/chat-1#")
        status = system.wait(lambda status: "placement group" in status["replicas"][0]["last_error"])
        system.wait(lambda status: bool(status["is_ready"]))
        assert system.ask().status_code == 200


def test_what_fits_nowhere_is_said_and_a_node_that_comes_is_used_and_missed(cluster: RayCluster) -> None:
    with running(cluster, nodes={"resources": {"CPU": 0.1}}) as system:
        config = write_config(cluster, system.port, nodes={"resources": {"CPU": 3}})
        assert cluster.headrace("apply", str(config)).returncode == 0
        waits = system.wait(lambda status: any("CPU 3 is asked" in r["phase"] for r in status["replicas"]))
        phase = next(r["phase"] for r in waits["replicas"] if r["phase"])
        assert "the most that one has is CPU 2" in phase
        assert system.ask().status_code == 200
        node = cluster.add_node("--num-cpus=3")
        status = system.wait(
            lambda status: (
                len(status["nodes"]) == 2 and bool(status["is_ready"]) and len(status["replicas"]) == 1
            )
        )
        large = next(entry["node_id"] for entry in status["nodes"] if entry["total"]["CPU"] == 3)
        assert status["replicas"][0]["node"] == large
        lost_s = time.monotonic()
        node.kill()
        status = system.wait(lambda status: status["replicas"][0]["last_error"] != "")
        print(f"a killed node was noticed within {time.monotonic() - lost_s:.2f} s")
        assert cluster.headrace("apply", str(write_config(cluster, system.port))).returncode == 0
        system.wait(lambda status: bool(status["is_ready"]) and len(status["replicas"]) == 1)
        assert system.ask().status_code == 200


class Load:
    """Clients that stream one answer after the other; `answers` has how each ended."""

    def __init__(self, system: System, num_clients: int, num_tokens: int) -> None:
        self.answers: list[str] = []
        self._system, self._num_tokens = system, num_tokens
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[str]:
        """Let the open ones end; return how all ended."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)
        return self.answers

    def _run(self) -> None:
        body = {
            "model": "chat",
            "max_tokens": self._num_tokens,
            "stream": True,
            "messages": [{"role": "user", "content": "hi"}],
        }
        while not self._is_over.is_set():
            try:
                answer = httpx.post(
                    f"http://127.0.0.1:{self._system.port}/v1/chat/completions", json=body, timeout=60
                )
                num_tokens = answer.text.count('"content":')
                is_whole = answer.text.endswith("data: [DONE]\n\n") and num_tokens >= self._num_tokens
                self.answers.append("whole" if is_whole else f"{answer.status_code}: {answer.text[-500:]}")
            except httpx.HTTPError as error:
                self.answers.append(repr(error))


def test_a_node_that_ray_drains_is_left_under_load_without_a_lost_request(cluster: RayCluster) -> None:
    node = cluster.add_node("--num-cpus=2", "--labels=kind=spot")
    spread = {"replicas": {"min": 2, "max": 4}, "simulated": {"step_ms": 20}}
    with running(cluster, **spread) as system:
        status = system.status()
        spot = next(entry for entry in status["nodes"] if entry["labels"].get("kind") == "spot")
        assert len(spot["replicas"]) == 1
        load, num_ready = Load(system, 4, 200), []
        drained_s = time.monotonic()
        cluster.drain_node(spot["node_id"], 90)

        def has_left(status: dict[str, Any]) -> bool:
            num_ready.append(status["endpoints"][0]["ready"])
            return not any(replica["node"] == spot["node_id"] for replica in status["replicas"])

        told = system.wait(lambda status: any(node["leaving"] for node in status["nodes"]))
        print(f"status said so after {time.monotonic() - drained_s:.1f} s")
        said = next(entry["leaving"] for entry in told["nodes"] if entry["node_id"] == spot["node_id"])
        assert said.startswith("draining for ")
        system.wait(has_left)
        print(f"its replica had left after {time.monotonic() - drained_s:.1f} s")
        assert min(num_ready) == 2, num_ready
        system.wait(lambda status: len(status["nodes"]) == 1)  # Ray ends a drained node that is empty
        answers = load.stop()
        print(f"{len(answers)} answers")
        assert set(answers) == {"whole"}, [answer for answer in answers if answer != "whole"]
    node.stop()


def test_a_replica_of_another_address_serves(cluster: RayCluster) -> None:
    node = cluster.add_node("--num-cpus=1", "--node-ip-address=127.0.0.2", "--labels=kind=far")
    with running(cluster, nodes={"labels": {"kind": "far"}}) as system:
        status = system.status()
        far = next(node for node in status["nodes"] if node["labels"].get("kind") == "far")
        assert (far["address"], far["replicas"]) == ("127.0.0.2", ["chat-1"])
        assert status["replicas"][0]["address"].startswith("127.0.0.2:")
        assert system.ask().status_code == 200
    node.stop()


def test_gateways_are_on_nodes_of_their_kind_never_two_on_one(cluster: RayCluster) -> None:
    nodes = [
        cluster.add_node("--num-cpus=4", f"--node-ip-address=127.0.0.{n}", "--labels=kind=edge")
        for n in (2, 2)  # one address, and so one port for both: loopback is that of the head's machine, too
    ]
    placement = {"resources": {"CPU": 0.5}, "labels": {"kind": "edge"}}
    with running(cluster, {"count": 2, "placement": placement}) as system:
        status = system.status()
        edges = {node["node_id"]: node for node in status["nodes"] if node["labels"].get("kind") == "edge"}
        places = {gateway["gateway_id"]: gateway["node"] for gateway in status["gateways"]}
        assert set(places.values()) == set(edges)
        assert sorted(node["gateways"] for node in edges.values()) == [["g1"], ["g2"]]
        assert sum("only programs there reach it" in text for text in status["warnings"]) == 2
        for _ in range(8):  # the kernel gives each connection to one of them
            assert system.ask().status_code == 200
        router = psutil.Process(pid_of(status, f"router-{min(places)}"))
        router.parent().kill()  # its keeper, with all of the gateway
        system.wait(lambda status: not status["is_ready"])
        status = system.wait(lambda status: bool(status["is_ready"]))
        assert {gateway["gateway_id"]: gateway["node"] for gateway in status["gateways"]} == places
        assert system.ask().status_code == 200
    for node in nodes:
        node.stop()


def test_ranks_have_hosts_of_their_own_and_are_lost_together(cluster: RayCluster) -> None:
    native = {"tensor_parallel": 2, "num_threads": 2, "dtype": "int8", "kv_cache_mb": 64, "packed_dir": "off"}
    with running(cluster, engine="native", native=native) as system:
        before = system.status()
        expected = system.ask().json()["choices"][0]["message"]["content"]
        engine, rank = pid_of(before, "engine chat-1"), titled("headrace: engine chat-1 rank 1")
        holder = titled("headrace: holder of rank 1")
        assert rank.ppid() == holder.pid
        rank.kill()  # the engine goes with it, and the front starts both again
        after = system.wait(lambda status: pid_of(status, "engine chat-1") not in (0, engine))
        after = system.wait(lambda status: bool(status["is_ready"]))
        assert pid_of(after, "front chat-1") == pid_of(before, "front chat-1")
        assert system.ask().json()["choices"][0]["message"]["content"] == expected
        keeper = holder.parent()
        assert keeper is not None
        host = keeper.parent()
        assert host is not None
        lost_s = time.monotonic()
        host.kill()
        system.wait(lambda status: "chat-1: the host of rank 1 is lost" in system.explain(status))
        print(f"a lost rank's host was noticed within {time.monotonic() - lost_s:.2f} s")
        fronts = {process["pid"] for process in before["processes"] if process["name"].startswith("front ")}
        system.wait(
            lambda status: (
                bool(status["is_ready"])
                and len(status["replicas"]) == 1
                and not fronts & {process["pid"] for process in status["processes"]}
            )
        )
        assert system.ask().json()["choices"][0]["message"]["content"] == expected


def test_down_ends_a_detached_system_from_anywhere(cluster: RayCluster) -> None:
    config = write_config(cluster, free_port())
    done = cluster.headrace(
        "up", str(config), "--launcher", "ray", "--address", cluster.address, "--detach", "--name", "other"
    )
    assert done.returncode == 0, done.stderr
    elsewhere = {"TMPDIR": "/var/tmp", "RAY_ADDRESS": cluster.address}
    asked = cluster.headrace("status", "--json", "--name", "other", **elsewhere)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["is_ready"]
    ended = cluster.headrace("down", "--name", "other", "--address", cluster.address)
    assert (ended.returncode, ended.stdout) == (0, "stopped\n"), ended.stderr
    again = cluster.headrace("down", "--name", "other", "--address", cluster.address)
    assert again.returncode == 1
    assert "no system called 'other'" in again.stderr


@pytest.mark.parametrize(
    ("change", "address", "words"),
    [
        ({}, "127.0.0.1:1", "cannot be reached: Connection refused"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "", "oken"),
        ({"RAY_AUTH_MODE": "disabled"}, "", "oken"),
        ({}, "nonsense", "is neither auto nor host:port"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_told_within_seconds(
    cluster: RayCluster, change: dict[str, str], address: str, words: str
) -> None:
    config = write_config(cluster, free_port())
    began_s = time.monotonic()
    done = cluster.headrace(
        "up", str(config), "--launcher", "ray", "--address", address or cluster.address, **change
    )
    print(f"told within {time.monotonic() - began_s:.1f} s: {done.stderr}")
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
