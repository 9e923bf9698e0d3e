"""A front with a real model on standby: starts asleep, wakes when its controller says so, sleeps again."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.integration.front_process import SIMULATED, FakeRouter, RunningFront, running_front

from headrace.api.framing import encode_frame
from headrace.api.messages import EngineSpec, SetSleep
from headrace.units import MIB

pytestmark = pytest.mark.slow
BODY = {
    "model": "chat",
    "messages": [{"role": "user", "content": "What is the capital of Italy? " * 40}],
    "max_tokens": 8,
    "temperature": 0,
}


class Controller(FakeRouter):
    """Hears a front's reports, and tells it how deep to sleep."""

    def set_sleep(self, level: Any) -> None:
        self._connections[-1].sendall(encode_frame(SetSleep(level)))


@contextmanager
def controlled_front(engine: EngineSpec, **spec_fields: Any) -> Iterator[tuple[RunningFront, Controller]]:
    """A front that reports to a router and to a controller."""
    with tempfile.TemporaryDirectory(prefix="headrace-standby-") as folder:
        controller = Controller(str(Path(folder) / "controller.sock"))
        router = FakeRouter(str(Path(folder) / "second.sock"))
        sockets = [str(Path(folder) / "second.sock"), str(Path(folder) / "controller.sock")]
        front = running_front(engine, extra_sockets=sockets, **spec_fields)
        try:
            with front as running:
                yield running, controller
        finally:
            controller.close()
            router.close()


def ask(front: RunningFront) -> httpx.Response:
    return httpx.post(f"{front.url}/v1/chat/completions", json=BODY, verify=False, timeout=60)


def resident_bytes(pid: int) -> int:
    """Memory of a process, shared pages of files included."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("Rss:")]
    return int(line.split()[1]) * 1024


def test_a_replica_starts_on_standby_wakes_serves_and_gives_its_memory_back(tmp_path: Path) -> None:
    spec = EngineSpec(
        "native", "smollm2-135m-instruct", packed_dir=str(tmp_path / "packed"), is_standby=True, num_threads=1
    )
    with controlled_front(spec) as (front, controller):
        report = controller.wait_for(lambda report: report.state == "standby", 100)
        assert report.engine is not None
        assert (report.phase, report.engine.sleep_level) == ("asleep at level 1", 1)
        refused = ask(front)
        assert refused.status_code == 503
        assert "on standby" in refused.json()["error"]["message"]
        assert httpx.get(f"{front.url}/ready", verify=False).json()["status"] == "standby"

        controller.set_sleep(0)
        front.wait_ready()
        first = ask(front).json()["choices"][0]["message"]["content"]
        pid = controller.latest.engine_pid
        awake_bytes = resident_bytes(pid)
        controller.set_sleep(2)
        controller.wait_for(lambda report: report.phase == "asleep at level 2")
        assert resident_bytes(pid) < awake_bytes - 128 * MIB, "weights and KV went"

        controller.set_sleep(0)
        front.wait_ready()
        assert ask(front).json()["choices"][0]["message"]["content"] == first
        assert controller.latest.engine_restarts == 0


def test_requests_that_are_open_keep_a_replica_awake() -> None:
    engine = EngineSpec("simulated", "simulated", simulated_step_s=0.05)
    with controlled_front(engine) as (front, controller):
        front.wait_ready()
        body = {**BODY, "max_tokens": 1000, "stream": True}
        url = f"{front.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, verify=False, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            controller.set_sleep(1)
            report = controller.wait_for(lambda report: "requests are open" in report.phase)
            assert report.state == "ready"
        controller.wait_for(lambda report: report.num_open == 0)
        controller.set_sleep(1)
        controller.wait_for(lambda report: report.state == "standby" and report.phase == "asleep at level 1")


def test_an_engine_that_dies_asleep_comes_back_asleep_and_one_that_was_woken_awake() -> None:
    with controlled_front(SIMULATED) as (front, controller):
        front.wait_ready()
        controller.set_sleep(1)
        report = controller.wait_for(lambda report: report.phase == "asleep at level 1")
        os.kill(report.engine_pid, signal.SIGKILL)
        controller.wait_for(
            lambda report: report.engine_restarts == 1 and report.phase == "asleep at level 1"
        )
        controller.set_sleep(0)
        report = front.wait_ready()
        os.kill(report.engine_pid, signal.SIGKILL)
        controller.wait_for(lambda report: report.engine_restarts == 2 and report.state == "ready")
        assert ask(front).status_code == 200


def test_only_a_controller_puts_a_replica_to_sleep() -> None:
    with controlled_front(SIMULATED) as (front, _):
        front.wait_ready()
        before = len(front.router._connections)
        front.router._connections[-1].sendall(encode_frame(SetSleep(1)))
        with front.router._changed:
            assert front.router._changed.wait_for(lambda: len(front.router._connections) > before, 10)
        assert front.wait_ready().state == "ready"


def test_a_replica_that_slept_before_waits_to_be_released_when_it_leaves() -> None:
    with controlled_front(SIMULATED) as (front, controller):
        front.wait_ready()
        front.router.answers_ready = controller.answers_ready = False
        controller.set_sleep(1)
        controller.wait_for(lambda report: report.phase == "asleep at level 1")
        controller.set_sleep(0)
        front.wait_ready()
        front.router.releases = False
        front.process.send_signal(signal.SIGTERM)
        front.router.wait_for(lambda report: report.state == "draining")
        with pytest.raises(subprocess.TimeoutExpired):  # without a release it stays for five seconds
            front.process.wait(1.5)
        assert ask(front).status_code == 200, "the router may still send requests"
        front.router.releases = True
        assert front.process.wait(10) == 0
