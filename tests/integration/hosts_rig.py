"""A system over several hosts: each has its own address on loopback and its own run directory, with real
keepers, tunnels, fronts and gateways, on a cluster that tests play. The controller is in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from tests.integration.gateway_rig import wait_for

from headrace.api.config import Config
from headrace.api.messages import GatewayStatus, GetStatus, NodeState, SystemStatus
from headrace.api.run_paths import IDENTITY_FILE
from headrace.clock import SystemClock
from headrace.control.app import Controller
from headrace.control.process_sources import cluster_sources
from headrace.fabric.cluster_identity import identity_pem, keep_identity, make_secret
from headrace.fabric.fake_cluster import FakeCluster
from headrace.fabric.host_messages import Membership
from headrace.fabric.ray_host import Host
from headrace.fabric.ray_launcher import RayLauncher
from headrace.fabric.shared_run_directory import SharedRunDirectory, host_run_directory

LIMIT_S = 30.0


@dataclass
class RunningSystem:
    controller: Controller
    cluster: FakeCluster
    launcher: RayLauncher
    url: str
    client: httpx.AsyncClient

    def status(self) -> SystemStatus:
        status = self.controller._obey(GetStatus()).status
        assert status is not None
        return status

    def node_of(self, replica_id: str) -> str:
        return next((r.node for r in self.status().replicas if r.replica_id == replica_id), "")

    def gateway(self, gateway_id: str) -> GatewayStatus:
        return next(each for each in self.status().gateways if each.gateway_id == gateway_id)

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

    async def ask(self, url: str = "", key: str = "") -> httpx.Response:
        body = {"model": "chat", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.post(f"{url or self.url}/chat/completions", json=body, headers=headers)


def last_words() -> list[str]:
    logs = Path(tempfile.gettempdir()).glob("headrace-*/*/logs/*.log")
    return [f"{log}:\n{log.read_text()[-2000:]}" for log in logs]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def running_system(config: Config, nodes: Sequence[NodeState]) -> AsyncIterator[RunningSystem]:
    """The controller in this process, on the first node; everything else as on a cluster."""
    identity = identity_pem(make_secret())

    def make_host(group: str, node: NodeState, membership: Membership) -> Host:
        return Host("demo", group, node.node_id, node.address, membership)

    cluster = FakeCluster(make_host, list(nodes))
    run_directory = SharedRunDirectory.join(host_run_directory("demo", nodes[0].address))
    keep_identity(identity, run_directory.path / IDENTITY_FILE)
    launcher = await RayLauncher.connect(cluster, SystemClock(), identity, run_directory.path)
    controller = Controller(run_directory.path, config, launcher, cluster_sources(config), SystemClock())
    running = asyncio.create_task(controller.run())
    try:
        async with httpx.AsyncClient(timeout=LIMIT_S) as client:
            url = f"http://{config.gateway.bind}/v1"
            yield RunningSystem(controller, cluster, launcher, url, client)
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
