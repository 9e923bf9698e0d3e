"""What an engine process started goes with it, whoever ends it and however."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from headrace.api.messages import EngineEvent, EngineSpec
from headrace.replica import engine_process
from headrace.replica.engine_process import EngineProcess

pytestmark = pytest.mark.slow  # each starts Python processes
DEADLINE_S = 20.0
ROOT = Path(__file__).resolve().parents[2]
LEADER = "tests.integration.spawning_leader"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_spawned_process_dies_with_its_spawner(is_settled: bool) -> None:
    """Even if that dies before the spawned one could say so."""
    leader = subprocess.Popen(
        [sys.executable, "-m", LEADER], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert leader.stderr is not None
    with leader.stderr:
        spawned = int(leader.stderr.readline().removeprefix("spawned "))
        if is_settled:
            assert leader.stderr.readline() == "lingering\n"
        leader.kill()
        leader.wait()
        wait_until(lambda: is_gone(spawned))


class Owner:
    """Waits for the exit."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()

    def on_event(self, event: EngineEvent) -> None:
        raise AssertionError(event)

    def on_lost(self, reason: str) -> None:
        pass

    def on_exit(self, description: str) -> None:
        self.exited.set()


async def test_what_a_dead_engine_process_left_in_its_group_is_killed_before_it_is_reaped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A leader that starts `sleep` and ends at once, as one that the system killed for its memory."""
    pid_file = tmp_path / "pid"
    module = tmp_path / "leader.py"
    module.write_text(
        "import pathlib, subprocess\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(subprocess.Popen(['sleep', '60']).pid))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(engine_process, "_MODULES", {"simulated": "leader"})
    owner = Owner()
    process = EngineProcess(owner)
    await process.start(EngineSpec("simulated", "simulated"), "headrace: engine test")
    async with asyncio.timeout(DEADLINE_S):
        await owner.exited.wait()
    wait_until(lambda: is_gone(int(pid_file.read_text())))
