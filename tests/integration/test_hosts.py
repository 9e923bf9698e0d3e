"""A system over several hosts: each has its own address on loopback and its own run directory, with real
keepers, tunnels, fronts and gateway, on a cluster that tests play."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from tests.integration.gateway_rig import wait_for

from headrace.api.config import Config
from headrace.api.messages import GetStatus, NodeState, SystemStatus
from headrace.api.run_paths import IDENTITY_FILE
from headrace.clock import SystemClock
from headrace.control.app import Controller, ProcessSources
from headrace.control.specs import cluster_replica_process
from headrace.fabric.cluster_identity import identity_pem, keep_identity, make_secret
from headrace.fabric.fake_cluster import FakeCluster
from headrace.fabric.host_messages import Membership
from headrace.fabric.ray_host import Host
from headrace.fabric.ray_launcher import RayLauncher
from headrace.fabric.shared_run_directory import SharedRunDirectory, host_run_directory
from headrace.gateway.process import prepare, process_specs

pytestmark = pytest.mark.slow
LIMIT_S = 30.0
HEAD = NodeState("head", "127.0.0.2", True, {"CPU": 1.0}, {}, {"kind": "head"})
WORKERS = [
    NodeState(f"worker{n}", f"127.0.0.{n + 2}", True, {"CPU": 0.1}, {}, {"kind": "worker"}) for n in (1, 2)
]


@pytest.fixture(autouse=True)
def short_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield


@dataclass
class RunningSystem:
    controller: Controller
    cluster: FakeCluster
    url: str
    client: httpx.AsyncClient

    def status(self) -> SystemStatus:
        status = self.controller._obey(GetStatus()).status
        assert status is not None
        return status

    def node_of(self, replica_id: str) -> str:
        return next((r.node for r in self.status().replicas if r.replica_id == replica_id), "")

    async def until(self, condition: str, *, ready: int) -> None:
        def is_so() -> bool:
            status = self.status()
            return status.is_ready and sum(replica.state == "ready" for replica in status.replicas) == ready

        try:
            await wait_for(is_so, condition, LIMIT_S)
        except AssertionError:
            print(self.status(), *last_words(), sep="\n")
            raise

    def lose(self, node_id: str) -> None:
        """As a machine goes: Ray misses it, and nothing that was there says a word more."""
        hosts = [host for host, node in self.cluster.running.values() if node == node_id]
        pids = [process.pid for host in hosts for process in host._processes.values()]
        self.cluster.lose_node(node_id)
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                keeper = psutil.Process(pid).parent()
                assert keeper is not None
                keeper.kill()

    async def ask(self) -> httpx.Response:
        body = {"model": "chat", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
        return await self.client.post(f"{self.url}/chat/completions", json=body)


def last_words() -> list[str]:
    logs = Path(tempfile.gettempdir()).glob("headrace-*/*/logs/*.log")
    return [f"{log}:\n{log.read_text()[-2000:]}" for log in logs]


def processes_that_show(secret: str) -> list[str]:
    """The children of this process in whose arguments or environment the secret is."""
    return [
        f"{process.name()}: {kind}"
        for process in psutil.Process(os.getpid()).children(recursive=True)
        for kind in ("cmdline", "environ")
        if secret.encode() in Path(f"/proc/{process.pid}/{kind}").read_bytes()
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_config(state_dir: Path, **endpoint: object) -> Config:
    chat = {
        "model": "smollm2-135m-instruct",
        "engine": "simulated",
        "replicas": {"min": 1, "max": 2},
        "nodes": {"labels": {"kind": "worker"}},
        **endpoint,
    }
    return Config.model_validate(
        {
            "launcher": "ray",
            "state_dir": str(state_dir),
            "endpoints": {"chat": chat},
            "gateway": {"bind": f"127.0.0.1:{free_port()}", "metrics_bind": ""},
        }
    )


@contextlib.asynccontextmanager
async def running_system(config: Config) -> AsyncIterator[RunningSystem]:
    """The controller in this process, on the first node; everything else as on a cluster."""
    identity = identity_pem(make_secret())

    def make_host(group: str, node: NodeState, membership: Membership) -> Host:
        return Host("demo", group, node.node_id, node.address, membership)

    cluster = FakeCluster(make_host, [HEAD, *WORKERS])
    run_directory = SharedRunDirectory.join(host_run_directory("demo", HEAD.address))
    keep_identity(identity, run_directory.path / IDENTITY_FILE)
    launcher = await RayLauncher.connect(cluster, SystemClock(), identity)
    sources = ProcessSources(prepare, process_specs, cluster_replica_process)
    controller = Controller(run_directory.path, config, launcher, sources, SystemClock())
    running = asyncio.create_task(controller.run())
    try:
        async with httpx.AsyncClient(timeout=LIMIT_S) as client:
            yield RunningSystem(controller, cluster, f"http://{config.gateway.bind}/v1", client)
        controller.stop()
        async with asyncio.timeout(LIMIT_S):
            await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        launcher.close()
        for key in await cluster.hosts():
            await cluster.release(key)
        run_directory.leave()
        left = Path(tempfile.gettempdir())
        await wait_for(lambda: not any(left.glob("headrace-*/*")), "nothing is left")


async def test_a_replica_of_another_host_serves_and_one_whose_host_dies_is_replaced(tmp_path: Path) -> None:
    async with running_system(make_config(tmp_path)) as system:
        await system.until("it serves", ready=1)
        answer = await system.ask()
        assert answer.status_code == 200, answer.text
        (replica,) = system.status().replicas
        first = next(node for node in WORKERS if node.node_id == replica.node)
        assert replica.address.startswith(f"{first.address}:")
        directory = host_run_directory("demo", first.address)
        for path in (directory / IDENTITY_FILE, directory / "controller.sock", directory / "g1/router.sock"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        secret = (directory / IDENTITY_FILE).read_text().splitlines()[1]
        assert processes_that_show(secret) == []
        system.lose(first.node_id)
        await wait_for(
            lambda: system.node_of("chat-1") not in ("", first.node_id), "another host has it", LIMIT_S
        )
        await system.until("it serves again", ready=1)
        answer = await system.ask()
        assert answer.status_code == 200, answer.text
        (replica,) = system.status().replicas
        assert "its node is gone" in replica.last_error


async def test_a_durable_stream_outlives_the_host_that_computes_it(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        replicas={"min": 2, "max": 2},
        streams={"durable": True},
        simulated={"step_ms": 20},
    )
    body = {
        "model": "chat",
        "max_tokens": 100,
        "seed": 1,
        "stream": True,
        "messages": [{"role": "user", "content": "hi"}],
    }
    async with running_system(config) as system:
        await system.until("both serve", ready=2)
        whole = await system.client.post(f"{system.url}/chat/completions", json={**body, "stream": False})
        expected = whole.json()["choices"][0]["message"]["content"]
        pieces: list[str] = []
        async with system.client.stream("POST", f"{system.url}/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    delta = httpx.Response(200, content=line[6:]).json()["choices"][0]["delta"]
                    pieces.append(delta.get("content") or "")
                    if len(pieces) == 10:
                        hosts = {r.node for r in system.status().replicas if r.num_open or r.num_guests}
                        assert hosts
                        system.lose(hosts.pop())
        assert "".join(pieces) == expected
