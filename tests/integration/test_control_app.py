"""The real controller and supervisor over programs that play fronts and gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.api.config_loader import parse_config
from headrace.api.messages import (
    AdminCommand,
    AdminReply,
    ApplyConfig,
    GetStatus,
    ProcessSpec,
    ScaleEndpoint,
    Shutdown,
    SystemStatus,
)
from headrace.control.admin import CommandRefused, NotRunning, ask_async
from headrace.control.applied import write_config
from headrace.fabric.supervisor import Supervisor

pytestmark = pytest.mark.slow
CONTROLLER = str(Path(__file__).with_name("fake_controller.py"))
LIMIT_S = 20.0


def tree(endpoints: Mapping[str, Any], port: int) -> dict[str, Any]:
    base = {"engine": "simulated", "model": "simulated"}
    return {
        "endpoints": {name: {**base, **fields} for name, fields in endpoints.items()},
        "gateway": {"bind": f"127.0.0.1:{port}"},
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Rig:
    """A supervisor in this process, its controller and everything else in processes of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        (directory / "logs").mkdir()

    def start(self, **endpoints: Mapping[str, Any]) -> None:
        write_config(self.directory, parse_config(tree(endpoints, self.port)))
        log_path = str(self.directory / "logs" / "controller.log")
        spec = ProcessSpec("controller", [sys.executable, CONTROLLER, str(self.directory)], log_path=log_path)
        self.supervisor = Supervisor(self.directory, spec, lambda notice: None)
        self.task = asyncio.create_task(self.supervisor.run())

    async def ask(self, command: AdminCommand) -> AdminReply:
        return await ask_async(self.directory, command)

    async def status(self) -> SystemStatus:
        status = (await self.ask(GetStatus())).status
        assert status is not None
        return status

    async def until(
        self, condition: Callable[[SystemStatus], bool], limit_s: float = LIMIT_S
    ) -> SystemStatus:
        deadline_s = time.monotonic() + limit_s
        status: SystemStatus | None = None
        while time.monotonic() < deadline_s:
            try:
                status = await self.status()
                if condition(status):
                    return status
            except NotRunning:
                pass
            await asyncio.sleep(0.02)
        log = (self.directory / "logs" / "controller.log").read_text()[-4000:]
        raise AssertionError(f"the status did not get there: {status}\n{log}")

    async def apply(self, **endpoints: Mapping[str, Any]) -> AdminReply:
        config = parse_config(tree(endpoints, self.port))
        return await self.ask(ApplyConfig(config.model_dump_json()))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    if not rig.task.done():
        rig.supervisor.stop("end of the test")
        rig.supervisor.stop("now")
    await asyncio.wait_for(rig.task, LIMIT_S)


def pids(status: SystemStatus) -> dict[str, int]:
    return {process.name: process.pid for process in status.processes if process.name != "controller"}


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_killed_controller_comes_back_and_touches_nothing(rig: Rig) -> None:
    rig.start(chat={"replicas": {"min": 2, "max": 4}}, other={"replicas": 1})
    before = await rig.until(lambda status: status.is_ready)
    await rig.ask(ScaleEndpoint("chat", 3))
    before = await rig.until(lambda status: status.is_ready and len(status.replicas) == 4)
    controller = next(process.pid for process in before.processes if process.name == "controller")
    os.kill(controller, signal.SIGKILL)
    after = await rig.until(lambda status: status.is_ready and status.uptime_s < before.uptime_s)
    assert pids(after) == pids(before)
    # It remembers the scale, finds what it did not start, and goes on acting.
    assert [endpoint.desired for endpoint in after.endpoints] == [3, 1]
    assert all(replica.restarts == 0 for replica in after.replicas)
    victim = next(replica for replica in after.replicas if replica.replica_id == "chat-2")
    os.kill(victim.pid, signal.SIGKILL)
    await rig.until(
        lambda s: s.is_ready and any(r.replica_id == "chat-2" and r.restarts == 1 for r in s.replicas)
    )


async def test_a_dead_or_hung_relay_is_started_again(rig: Rig) -> None:
    rig.start(chat={}, other={})
    status = await rig.until(lambda s: s.is_ready and pids(s).get("relay-g1"))
    before = pids(status)
    os.kill(before["relay-g1"], signal.SIGKILL)
    after = pids(await rig.until(lambda s: pids(s)["relay-g1"] not in (0, before["relay-g1"])))
    others = ("router-g1", "haproxy-g1")
    assert {name: after[name] for name in others} == {name: before[name] for name in others}

    os.kill(after["relay-g1"], signal.SIGSTOP)
    hung = after["relay-g1"]
    await rig.until(lambda s: pids(s)["relay-g1"] not in (0, hung))


async def test_router_and_haproxy_are_started_again(rig: Rig) -> None:
    rig.start(chat={})
    before = pids(await rig.until(lambda status: status.is_ready))
    for name in ("router-g1", "haproxy-g1"):
        os.kill(before[name], signal.SIGKILL)
    after = await rig.until(lambda s: s.is_ready and pids(s)["router-g1"] not in (0, before["router-g1"]))
    after = await rig.until(lambda s: s.is_ready and pids(s)["haproxy-g1"] not in (0, before["haproxy-g1"]))
    assert pids(after)["front chat-1"] == before["front chat-1"]


async def test_a_crash_loop_and_a_hopeless_replica_become_failed_with_their_last_words(rig: Rig) -> None:
    rig.start(good={}, crash={"model": "crash"}, broken={"model": "broken"})
    status = await rig.until(
        lambda s: (
            {r.replica_id: r.state for r in s.replicas}
            == {"good-1": "ready", "crash-1": "failed", "broken-1": "failed"}
        )
    )
    errors = {replica.replica_id: replica for replica in status.replicas}
    assert errors["crash-1"].last_error == "exited with 7: no memory left"
    assert errors["crash-1"].restarts == 4
    assert errors["broken-1"].last_error == "the weights are damaged"
    assert errors["broken-1"].restarts == 0
    assert not status.is_ready
    # A corrected config is tried at once.
    await rig.apply(good={}, crash={}, broken={})
    await rig.until(lambda s: s.is_ready and len(s.replicas) == 3, 10)


async def test_a_changed_config_replaces_one_by_one_and_never_serves_with_less(rig: Rig) -> None:
    rig.start(chat={"replicas": {"min": 2, "max": 2}})
    before = await rig.until(lambda status: status.is_ready)
    reply = await rig.apply(chat={"replicas": {"min": 2, "max": 2}, "max_open": 3})
    assert reply.notes == [
        "chat: changed; its replicas are replaced step by step (`headrace rollout status`)"
    ]
    least_ready, most_alive = 99, 0

    def watch(status: SystemStatus) -> bool:
        nonlocal least_ready, most_alive
        least_ready = min(least_ready, status.endpoints[0].ready)
        most_alive = max(most_alive, len(status.replicas))
        return status.is_ready and len(status.replicas) == 2

    after = await rig.until(watch)
    assert least_ready >= 2
    assert most_alive == 3
    assert not {replica.pid for replica in before.replicas} & {replica.pid for replica in after.replicas}


async def test_endpoints_come_and_go_with_apply_and_bad_wishes_change_nothing(rig: Rig) -> None:
    rig.start(chat={"replicas": {"min": 1, "max": 2}})
    await rig.until(lambda status: status.is_ready)
    for command, words in [
        (ScaleEndpoint("nope", 1), "there are: chat"),
        (ScaleEndpoint("chat", 3), "replicas.max is 2"),
        (ApplyConfig("{"), "not JSON"),
        (ApplyConfig('{"endpoints": {}}'), "endpoints"),
        (ApplyConfig(parse_config(tree({"chat": {}}, 1)).model_dump_json()), "gateway.bind"),
    ]:
        with pytest.raises(CommandRefused, match=words):
            await rig.ask(command)
    await rig.apply(new={})
    await rig.until(lambda s: s.is_ready and [r.replica_id for r in s.replicas] == ["new-1"])


async def test_a_hung_front_is_killed_and_replaced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.start(chat={})
    before = await rig.until(lambda status: status.is_ready)
    pid = before.replicas[0].pid
    os.kill(pid, signal.SIGSTOP)
    after = await rig.until(lambda s: s.is_ready and s.replicas[0].restarts == 1, 25)
    assert is_gone(pid)
    assert after.replicas[0].replica_id == "chat-1"
    assert "no load report" in after.replicas[0].last_error


async def test_shutdown_drains_and_leaves_no_process(rig: Rig) -> None:
    rig.start(chat={"replicas": 2})
    before = await rig.until(lambda status: status.is_ready)
    await rig.ask(Shutdown())
    await asyncio.wait_for(rig.task, LIMIT_S)
    everything = {process.name: process.pid for process in before.processes if process.name != "up"}
    assert all(is_gone(pid) for pid in everything.values())
