"""Whole systems whose version changes under load, and whose replicas wait on standby; simulated engines."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import headrace
from headrace.api.messages import ChangeRollout, RolloutStatus, SystemStatus
from headrace.control.admin import CommandRefused, NotRunning, ask
from headrace.control.serve import System

pytestmark = pytest.mark.slow
LIMIT_S = 40.0
QUICK = {"stage_s": 0.5, "min_requests": 3}


def tree(**chat: Any) -> dict[str, Any]:
    base = {
        "model": "simulated",
        "engine": "simulated",
        "simulated": {"step_ms": 2},
        "replicas": {"min": 1, "max": 1},
        "rollout": QUICK,
        "drain_grace_s": 5,
    }
    return {"endpoints": {"chat": {**base, **chat}}, "gateway": {"bind": "127.0.0.1:0"}}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., System]]:
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        monkeypatch.setenv("XDG_STATE_HOME", str(Path(name) / "state"))
        systems: list[System] = []

        def start(**chat: Any) -> System:
            systems.append(headrace.serve(tree(**chat)))
            return systems[-1]

        yield start
        for system in systems:
            system.close()


def wait(system: System, condition: Callable[[SystemStatus], bool]) -> SystemStatus:
    deadline_s = time.monotonic() + LIMIT_S
    status: SystemStatus | None = None
    while time.monotonic() < deadline_s:
        try:
            status = system.status()
            if condition(status):
                return status
        except NotRunning:
            pass  # its controller is being restarted
        time.sleep(0.02)
    raise AssertionError(f"the status did not get there: {status}")


def rollout_of(status: SystemStatus) -> RolloutStatus | None:
    return status.rollouts[0] if status.rollouts else None


def has_ended(status: SystemStatus, state: str) -> bool:
    rollout = rollout_of(status)
    return status.is_ready and rollout is not None and rollout.state == state


@asynccontextmanager
async def load(system: System, num_clients: int = 6) -> AsyncIterator[Counter[str]]:
    """Clients that stream one short answer after another; counts how each ended."""
    outcomes: Counter[str] = Counter()
    is_over = False
    body = {"model": "chat", "stream": True, "max_tokens": 20}
    body["messages"] = [{"role": "user", "content": "Go"}]

    async def client(http: httpx.AsyncClient) -> None:
        while not is_over:
            try:
                async with http.stream("POST", f"{system.url}/chat/completions", json=body) as response:
                    text = "".join([part async for part in response.aiter_text()])
                is_whole = response.status_code == 200 and text.rstrip().endswith("data: [DONE]")
                outcomes["finished" if is_whole else f"{response.status_code}: {text[-200:]}"] += 1
            except httpx.HTTPError as error:
                outcomes[repr(error)] += 1

    async with httpx.AsyncClient(timeout=30) as http:
        clients = [asyncio.create_task(client(http)) for _ in range(num_clients)]
        try:
            yield outcomes
        finally:
            is_over = True
            await asyncio.wait_for(asyncio.gather(*clients), 30)


async def test_a_rollout_under_load_goes_through_its_stages_and_is_promoted(
    serve: Callable[..., System],
) -> None:
    system = await asyncio.to_thread(serve, replicas={"min": 2, "max": 2})
    before = {replica.pid for replica in system.status().replicas}
    parts: list[float] = []
    least_ready = 9

    def watch(status: SystemStatus) -> bool:
        nonlocal least_ready
        rollout = rollout_of(status)
        assert rollout is not None
        if rollout.state == "running" and rollout.traffic not in parts:
            parts.append(rollout.traffic)
        least_ready = min(least_ready, status.endpoints[0].ready)
        return has_ended(status, "promoted") and len(status.replicas) == 2

    async with load(system) as outcomes:
        system.apply(tree(replicas={"min": 2, "max": 2}, max_open=32))
        status = await asyncio.to_thread(wait, system, watch)
    assert set(outcomes) == {"finished"}, outcomes
    assert parts[-3:] == [0.1, 0.5, 1.0]
    assert least_ready >= 2
    assert not before & {replica.pid for replica in status.replicas}
    with pytest.raises(CommandRefused, match="no rollout of 'chat' to pause; the last one was promoted"):
        ask(system.run_directory, ChangeRollout("chat", "pause"))

    generation = status.replicas[0].generation
    assert "going back" in ask(system.run_directory, ChangeRollout("chat", "undo")).notes[0]
    status = wait(system, lambda s: has_ended(s, "rolled_back") and len(s.replicas) == 2)
    assert generation not in {replica.generation for replica in status.replicas}
    with pytest.raises(CommandRefused, match="back at its old version already: undone by a user"):
        ask(system.run_directory, ChangeRollout("chat", "undo"))


async def test_a_version_that_cannot_start_never_gets_a_request_and_is_taken_back(
    serve: Callable[..., System], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF but not really")
    system = await asyncio.to_thread(serve)
    before = [replica.pid for replica in system.status().replicas]
    async with load(system) as outcomes:
        system.apply(tree(model=str(damaged), engine="native"))
        status = await asyncio.to_thread(wait, system, lambda s: has_ended(s, "rolled_back"))
        status = await asyncio.to_thread(wait, system, lambda s: len(s.replicas) == 1)
    assert set(outcomes) == {"finished"}, outcomes
    assert [replica.pid for replica in status.replicas] == before
    rollout = rollout_of(status)
    assert rollout is not None
    assert "the new version cannot start" in rollout.reason
    assert "damaged.gguf" in rollout.reason
    assert status.endpoints[0].engine == "simulated", "what runs is said, not what was applied"
    words = run(system, "rollout", "status", "chat")
    assert words.startswith("chat: rolled back for ")
    assert f"old {rollout.old}: 1 replica ready, 100% of the requests" in words


async def test_a_version_that_is_never_ready_and_one_that_is_too_slow_are_taken_back(
    serve: Callable[..., System],
) -> None:
    rules = {"min_requests": 3, "stage_s": 60, "traffic": [0.5, 1.0]}
    slo = {"itl_ms": 200}
    system = await asyncio.to_thread(serve, slo=slo, rollout=rules)
    before = [replica.pid for replica in system.status().replicas]
    never_ready = tree(slo=slo, rollout={**rules, "start_limit_s": 2}, simulated={"start_s": 600})
    too_slow = tree(slo=slo, rollout=rules, simulated={"step_ms": 300})

    async def taken_back(reason: str) -> None:
        def is_back(status: SystemStatus) -> bool:
            rollout = rollout_of(status)
            is_over = has_ended(status, "rolled_back") and len(status.replicas) == 1
            return is_over and rollout is not None and reason in rollout.reason

        status = await asyncio.to_thread(wait, system, is_back)
        assert [replica.pid for replica in status.replicas] == before

    async with load(system, 3) as outcomes:
        system.apply(never_ready)
        await taken_back("start_limit_s")
        system.apply(too_slow)
        await taken_back("slo.itl_ms")
    assert set(outcomes) == {"finished"}, outcomes


async def test_with_room_for_one_requests_are_held_while_versions_swap_and_a_bad_one_swaps_back(
    serve: Callable[..., System], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF but not really")
    rollout = {**QUICK, "surge": 0}
    system = await asyncio.to_thread(serve, replicas=1, rollout=rollout)
    most_alive = 0

    def watch(status: SystemStatus) -> int:
        nonlocal most_alive
        most_alive = max(most_alive, len(status.replicas))
        return len(status.replicas) == 1

    async with load(system, 3) as outcomes:
        system.apply(tree(replicas=1, rollout=rollout, max_open=32))
        await asyncio.to_thread(wait, system, lambda s: watch(s) and has_ended(s, "promoted"))
        system.apply(tree(replicas=1, rollout=rollout, model=str(damaged), engine="native"))
        await asyncio.to_thread(wait, system, lambda s: watch(s) and has_ended(s, "rolled_back"))
    assert set(outcomes) == {"finished"}, outcomes
    assert most_alive == 1


def test_a_restarted_controller_goes_on_with_a_paused_rollout(serve: Callable[..., System]) -> None:
    system = serve(rollout={"stage_s": 600})
    system.apply(tree(rollout={"stage_s": 600}, max_open=32))
    wait(system, lambda s: s.endpoints[0].ready == 2)
    assert run(system, "rollout", "pause", "chat") == "chat: its rollout is paused\n"
    before = system.status()
    controller = next(process.pid for process in before.processes if process.name == "controller")
    os.kill(controller, signal.SIGKILL)
    after = wait(system, lambda s: s.uptime_s < before.uptime_s and s.is_ready)
    assert [rollout.state for rollout in after.rollouts] == ["paused"]
    assert {r.pid for r in after.replicas} == {r.pid for r in before.replicas}
    assert run(system, "rollout", "resume", "chat") == "chat: its rollout goes on\n"
    wait(system, lambda s: s.rollouts[0].traffic > 0)
    assert "going back" in run(system, "rollout", "undo", "chat")
    status = wait(system, lambda s: has_ended(s, "rolled_back") and len(s.replicas) == 1)
    assert status.replicas[0].pid in {r.pid for r in before.replicas}
    assert status.replicas[0].generation == after.rollouts[0].old


def test_a_standby_serves_the_first_request_at_zero_and_is_refilled(serve: Callable[..., System]) -> None:
    system = serve(replicas={"min": 0, "max": 2, "standby": 1}, simulated={"step_ms": 2, "start_s": 1})
    asleep = wait(system, lambda s: [r.state for r in s.replicas] == ["standby"])
    assert (asleep.endpoints[0].standby, asleep.endpoints[0].desired_standby) == (1, 1)
    assert 0 < asleep.endpoints[0].eta_s < 1
    body = {"model": "chat", "max_tokens": 2, "messages": [{"role": "user", "content": "Go"}]}
    answer = httpx.post(f"{system.url}/chat/completions", json=body, timeout=LIMIT_S)
    assert answer.status_code == 200
    status = wait(system, lambda s: sorted(r.state for r in s.replicas) == ["ready", "standby"])
    ready = next(replica for replica in status.replicas if replica.state == "ready")
    assert ready.pid == asleep.replicas[0].pid, "the one that was asleep, and no cold start"


def test_a_replica_that_is_too_many_becomes_the_missing_standby_and_serves_again(
    serve: Callable[..., System],
) -> None:
    system = serve(replicas={"min": 2, "max": 2, "standby": 1})
    before = {replica.pid for replica in system.status().replicas}
    system.scale("chat", 1)
    status = wait(system, lambda s: sorted(r.state for r in s.replicas) == ["ready", "standby"])
    assert {replica.pid for replica in status.replicas} == before
    system.scale("chat", 2)
    status = wait(system, lambda s: [r.state for r in s.replicas] == ["ready", "ready"])
    assert {replica.pid for replica in status.replicas} == before


def run(system: System, *words: str) -> str:
    """A command of the CLI about this system."""
    command = [sys.executable, "-m", "headrace", *words, "--name", system.run_directory.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout
