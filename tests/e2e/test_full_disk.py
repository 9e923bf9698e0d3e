"""The disk of the run directory, logs included, is full: nothing that serves stops, and it heals.

The disk is a small tmpfs that only this system sees, in a mount namespace of its own.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest
from benchmarks.watched_streams import Ask, SteadyLoad, StreamResult, ask_all

from tests.e2e.conftest import RunningSystem, wait_until

CONFIG = """
endpoints:
  chat:
    model: simulated
    engine: simulated
    replicas: {min: 2, max: 3}
    simulated: {step_ms: 5}
"""
ASKS = [Ask(number, 3 + number, 20 + number, is_seeded=True) for number in range(8)]
NUM_STREAMS = 4


def can_mount() -> bool:
    """Whether this user may mount in a namespace of its own (root may, outside most containers)."""
    try:
        mount = ["mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        done = subprocess.run(["unshare", "--mount", *mount], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_mount(), reason="a full disk needs the right to mount a tmpfs (unshare -m)"),
]


class SmallDisk:
    """A system whose run directory, state and temporary files are on a disk of 8 MB."""

    def __init__(self, outside: Path) -> None:
        self.directory = outside / "run"
        self.directory.mkdir()
        config = outside / "config.yaml"
        config.write_text(CONFIG)
        mount = f'mount -t tmpfs -o size=8m,mode=700 tmpfs {self.directory} && exec "$@"'
        self.system = RunningSystem(
            self.directory, str(config), prefix=["unshare", "--mount", "sh", "-c", mount, "sh"]
        )
        self.inside: Sequence[str] = ["nsenter", "-t", str(self.system.process.pid), "-m"]
        self.system.command_prefix = self.inside

    def shell(self, command: str) -> str:
        """Run a shell command that sees the disk; return its output. Its exit status is not looked at."""
        done = subprocess.run([*self.inside, "sh", "-c", command], capture_output=True, text=True, timeout=30)
        return done.stdout

    def fill(self) -> None:
        self.shell(f"cat /dev/zero > {self.directory}/fill")
        assert self.num_free() == 0

    def num_free(self) -> int:
        return int(self.shell(f"df --output=avail {self.directory}").split()[-1])

    def free(self) -> None:
        self.shell(f"rm {self.directory}/fill")
        assert self.num_free() > 0

    def request_log(self) -> list[str]:
        files = f"find {self.directory} -name 'requests-*.jsonl'"
        return self.shell(f"cat $({files}) /dev/null").splitlines()


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    with tempfile.TemporaryDirectory(prefix="hr-") as name:  # short enough for the paths of sockets
        disk = SmallDisk(Path(name))
        try:
            disk.system.wait_ready()
            yield disk
        finally:
            disk.system.close()


def pid_of(system: RunningSystem, name: str) -> int:
    pids = {process["name"]: process["pid"] for process in system.status().get("processes", [])}
    return int(pids.get(name, 0))


def wait_for_streams(load: SteadyLoad, num_more: int) -> None:
    target = len(load.results) + num_more
    wait_until(lambda: len(load.results) >= target, 60, f"{target} streams have ended")


def kill_and_wait(system: RunningSystem, name: str) -> None:
    """Kill a process; wait until another one has its place, and all is ready."""
    old_pid = pid_of(system, name)
    psutil.Process(old_pid).kill()

    def is_back() -> bool:
        return pid_of(system, name) not in (0, old_pid) and bool(system.status().get("is_ready"))

    try:
        wait_until(is_back, 25, f"a new {name}")
    except AssertionError as error:
        answer = system.command("status")
        said = system.log.read_text()[-2000:]
        raise AssertionError(f"{error}\n{answer.stdout}{answer.stderr}\n{said}") from None


def replica_of_one_request(system: RunningSystem) -> str:
    body = {"model": "chat", "max_tokens": 2, "messages": [{"role": "user", "content": "Go"}]}
    answer = httpx.post(f"{system.url}/chat/completions", json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-headrace-replica"]


@pytest.mark.timeout(240)
def test_a_full_disk_stops_nothing_and_keeps_nothing_from_starting_again(disk: SmallDisk) -> None:
    system = disk.system
    right: list[StreamResult] = ask_all(system.url, ASKS, NUM_STREAMS)
    wait_until(lambda: len(disk.request_log()) >= len(ASKS), 10, "the requests have their lines")
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        disk.fill()
        wait_for_streams(load, 4 * NUM_STREAMS)
        for name in ("controller", "router-g1", "relay-g1"):
            kill_and_wait(system, name)
            wait_for_streams(load, NUM_STREAMS)
        os.kill(system.find_process("headrace: engine chat-1").pid, 9)
        assert system.command("scale", "chat", "3").returncode == 0
        wait_until(
            lambda: [replica["state"] for replica in system.status()["replicas"]] == ["ready"] * 3,
            40,
            "a replica that was started on a full disk",
        )
        wait_until(lambda: replica_of_one_request(system) == "chat-3", 20, "HAProxy sends it requests")
    assert set(load.outcomes()) == {"same"}, load.wrong()
    num_lines = len(disk.request_log())
    disk.free()
    ask_all(system.url, ASKS, NUM_STREAMS)
    wait_until(lambda: len(disk.request_log()) >= num_lines + len(ASKS), 10, "lines are written again")
    assert any("dropped_lines" in line for line in disk.request_log())
