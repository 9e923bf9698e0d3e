"""One contract for launchers: the fake behaves as the real one."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace.api.messages import (
    LauncherError,
    LauncherEvent,
    Nodes,
    NodeState,
    ProcessEnded,
    Processes,
    ProcessSpec,
    ProcessStarted,
    ProcessWaiting,
)
from headrace.clock import SystemClock
from headrace.fabric.fake_cluster import FakeCluster
from headrace.fabric.host_messages import Membership
from headrace.fabric.launcher import FakeLauncher, Launcher
from headrace.fabric.local import LauncherLost, LocalLauncher
from headrace.fabric.ray_host import Host
from headrace.fabric.ray_launcher import RayLauncher
from headrace.fabric.supervisor import Supervisor

SLEEPER = ProcessSpec("worker", [sys.executable, "-S", "-c", "import time; time.sleep(600)"])
LIMIT_S = 10.0


class ObedientFake(FakeLauncher):
    """Processes that end as soon as they are told to."""

    def stop(self, name: str, grace_s: float) -> None:
        super().stop(name, grace_s)
        if name in self.stopping:
            self.end(name, -15)


@asynccontextmanager
async def fake(directory: Path) -> AsyncIterator[Launcher]:
    yield ObedientFake()


@asynccontextmanager
async def local(directory: Path) -> AsyncIterator[Launcher]:
    controller = ProcessSpec("controller", SLEEPER.argv)
    supervisor = Supervisor(directory, controller, lambda notice: None)
    task = asyncio.create_task(supervisor.run())
    launcher: LocalLauncher | None = None
    while launcher is None:
        with contextlib.suppress(LauncherLost):
            launcher = await LocalLauncher.connect(directory)
        await asyncio.sleep(0.01)
    yield launcher
    launcher.close()
    supervisor.stop("end")
    supervisor.stop("now")
    await asyncio.wait_for(task, LIMIT_S)


async def take(launcher: Launcher) -> LauncherEvent:
    while isinstance(event := await asyncio.wait_for(launcher.next_event(), LIMIT_S), Nodes | ProcessWaiting):
        pass  # a cluster says more than is asked
    return event


@asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[Launcher]:
    def make_host(group: str, node: NodeState, membership: Membership) -> Host:
        return Host("contract", group, node.node_id, node.address)

    seam = FakeCluster(make_host, [NodeState("here", "10.0.0.1", total={"CPU": 1.0})])
    launcher = await RayLauncher.connect(seam, SystemClock(), b"")
    yield launcher
    launcher.close()
    for key in await seam.hosts():
        await seam.release(key)


@pytest.mark.parametrize("make", [fake, local, cluster])
async def test_a_launcher_starts_lists_and_stops(make: type, tmp_path: Path) -> None:
    async with make(tmp_path) as launcher:
        launcher.start(SLEEPER)
        event = await take(launcher)
        assert isinstance(event, ProcessStarted)
        pid = event.process.pid
        assert event.process.is_alive
        launcher.start(SLEEPER)
        launcher.stop("nobody", 1.0)
        errors = [await take(launcher), await take(launcher)]
        assert [error.name for error in errors if isinstance(error, LauncherError)] == ["worker", "nobody"]
        launcher.list_processes()
        event = await take(launcher)
        assert isinstance(event, Processes)
        assert {process.name: process.pid for process in event.processes}["worker"] == pid
        launcher.stop("worker", 5.0)
        event = await take(launcher)
        assert isinstance(event, ProcessEnded)
        assert (event.process.name, event.process.pid, event.process.exit_code) == ("worker", pid, -15)
        assert not event.process.is_alive
