"""`headrace up` as a user starts it, with the real gateway and fronts and simulated engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
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
import psutil
import pytest

import headrace
from headrace.control.admin import CommandRefused
from headrace.control.serve import StartFailed, System
from headrace.errors import ConfigError

pytestmark = pytest.mark.slow
LIMIT_S = 40.0


def tree(**chat: Any) -> dict[str, Any]:
    base = {"model": "simulated", "engine": "simulated", "simulated": {"step_ms": 5}}
    return {"endpoints": {"chat": {**base, **chat}}, "gateway": {"bind": "127.0.0.1:0"}}


def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(0.02)


def are_gone(processes: list[psutil.Process], limit_s: float = 2.0) -> bool:
    """Also when their new parent has not reaped them."""

    def is_over(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(lambda: all(map(is_over, processes)), limit_s)
    return True


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with a short path, as UNIX sockets need."""
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)
        assert list(Path(name).iterdir()) == [], "the system left something behind"


class Up:
    """`headrace up` in a process of its own."""

    def __init__(self, directory: Path, *arguments: str, **chat: Any) -> None:
        self.config = directory / "config.yaml"
        self.config.write_text(json.dumps(tree(**chat)))
        self.log = directory / "up.log"
        command = [sys.executable, "-m", "headrace", "up", str(self.config), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait_ready(self) -> None:
        until(lambda: "ready: http" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def start_up(runtime: Path, tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str, **chat: Any) -> Up:
        started.append(Up(tmp_path, *arguments, **chat))
        return started[-1]

    yield start
    for up in started:
        up.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


@asynccontextmanager
async def load(url: str, num_clients: int = 8) -> AsyncIterator[Counter[str]]:
    """Clients that stream one short answer after another; counts how each ended."""
    outcomes: Counter[str] = Counter()
    stop = asyncio.Event()
    body = {
        "model": "chat",
        "stream": True,
        "max_tokens": 40,
        "messages": [{"role": "user", "content": "Go"}],
    }

    async def client(http: httpx.AsyncClient) -> None:
        while not stop.is_set():
            try:
                async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
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
            stop.set()
            await asyncio.wait_for(asyncio.gather(*clients), 30)


async def settle(system: System, outcomes: Counter[str]) -> None:
    """Wait for the system, then for a few more answers."""
    await asyncio.to_thread(system.wait_until_ready, LIMIT_S)
    wanted = outcomes.total() + 8
    async with asyncio.timeout(LIMIT_S):
        while outcomes.total() < wanted:  # noqa: ASYNC110, a counter of the clients
            await asyncio.sleep(0.02)


async def test_scaling_and_applying_under_load_lose_no_request(runtime: Path) -> None:
    config = tree(replicas={"min": 1, "max": 3}, rollout={"stage_s": 1})
    system = await asyncio.to_thread(headrace.serve, config)
    try:
        first = {replica.pid for replica in system.status().replicas}
        async with load(system.url) as outcomes:
            system.scale("chat", 3)
            await settle(system, outcomes)
            assert {replica.replica_id for replica in system.status().replicas} == {
                "chat-1",
                "chat-2",
                "chat-3",
            }
            system.scale("chat", 1)
            await settle(system, outcomes)
            reply = system.apply(tree(replicas={"min": 1, "max": 3}, rollout={"stage_s": 1}, max_open=32))
            assert "replaced" in " ".join(reply.notes)
            await settle(system, outcomes)
        assert set(outcomes) == {"finished"}, outcomes
        assert outcomes["finished"] >= 24
        (replica,) = system.status().replicas
        assert replica.pid not in first
    finally:
        await asyncio.to_thread(system.close)


async def test_zero_comes_at_once_open_streams_end_whole_and_the_next_request_starts_it_again(
    runtime: Path,
) -> None:
    config = tree(replicas={"min": 1, "max": 1}, simulated={"step_ms": 20}, drain_grace_s=10)
    system = await asyncio.to_thread(headrace.serve, config)
    question = {"messages": [{"role": "user", "content": "Go"}], "model": "chat", "stream": True}
    path = f"{system.url}/chat/completions"

    def states() -> list[str]:
        return [replica.state for replica in system.status().replicas]

    try:
        async with httpx.AsyncClient(timeout=LIMIT_S) as http:
            async with http.stream("POST", path, json={**question, "max_tokens": 100}) as response:
                parts = response.aiter_lines()
                await anext(parts)
                await asyncio.to_thread(system.scale, "chat", 0)
                await asyncio.to_thread(until, lambda: states() == ["draining"], 1.0)
                lines = [line async for line in parts if line]
            assert lines[-1] == "data: [DONE]"
            assert sum('"content"' in line for line in lines) >= 90, "it was open for most of its time"
            await asyncio.to_thread(until, lambda: states() == [], 5.0)
            answer = await http.post(path, json={**question, "stream": False, "max_tokens": 2})
            assert answer.status_code == 200
            assert states() == ["ready"], "it stays for as long as after any request"
    finally:
        await asyncio.to_thread(system.close)


def test_serve_gives_a_client_and_leaves_nothing(runtime: Path) -> None:
    with headrace.serve(tree()) as system:
        processes = psutil.Process(system.status().processes[0].pid).children(recursive=True)
        assert len(processes) >= 5
        answer = system.client("chat").chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        with pytest.raises(CommandRefused, match=r"replicas\.max is 1"):
            system.scale("chat", 2)
        with pytest.raises(ConfigError, match="there are: chat"):
            system.client("nope")
    assert are_gone(processes)
    system.close()  # once more is harmless


def test_serve_says_what_failed(runtime: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-like-this"):
        headrace.serve(tree(model="nothing-like-this"))
    damaged = runtime / "damaged.gguf"
    damaged.write_bytes(b"GGUF but not really")
    try:
        with pytest.raises(StartFailed, match="chat-1 is failed"):
            headrace.serve(tree(model=str(damaged), engine="native"))
    finally:
        damaged.unlink()


def test_a_program_that_dies_takes_its_served_system_with_it(runtime: Path) -> None:
    code = (
        "import headrace, sys, time;"
        f" system = headrace.serve({tree()!r});"
        " print(system.status().processes[0].pid, flush=True); time.sleep(600)"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    try:
        supervisor = psutil.Process(int(program.stdout.readline()))
        processes = [supervisor, *supervisor.children(recursive=True)]
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    assert are_gone(processes, LIMIT_S)


def test_ctrl_c_finishes_open_requests_and_leaves_nothing(start_up: Callable[..., Up], runtime: Path) -> None:
    up = start_up()
    up.wait_ready()
    url = up.log.read_text().split("ready: ")[1].split()[0]
    second = run("up", str(up.config))
    assert second.returncode == 1
    assert "already runs" in second.stderr
    status = json.loads(run("status", "--json").stdout)
    assert status["is_ready"]
    assert status["url"] == url
    assert "chat-1" in run("status").stdout
    processes = up.descendants()
    body = {
        "model": "chat",
        "stream": True,
        "max_tokens": 200,
        "messages": [{"role": "user", "content": "Go"}],
    }
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        up.process.send_signal(signal.SIGINT)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert up.process.wait(LIMIT_S) == 0, up.log.read_text()
    assert are_gone(processes)
    missing = run("status")
    assert missing.returncode == 1
    assert "no system called 'default' is running" in missing.stderr


def test_a_second_ctrl_c_stops_at_once(start_up: Callable[..., Up]) -> None:
    up = start_up()
    up.wait_ready()
    processes = up.descendants()
    url = up.log.read_text().split("ready: ")[1].split()[0]
    body = {
        "model": "chat",
        "stream": True,
        "max_tokens": 5000,
        "messages": [{"role": "user", "content": "Go"}],
    }
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
        up.process.send_signal(signal.SIGINT)
        until(lambda: "finished first" in up.log.read_text())
        up.process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        up.process.wait(LIMIT_S)
        assert time.monotonic() - began_s < 3
    assert are_gone(processes)


def test_a_killed_supervisor_takes_haproxys_worker_and_all_engines_with_it(
    start_up: Callable[..., Up], runtime: Path
) -> None:
    up = start_up(replicas=2)
    up.wait_ready()
    processes = up.descendants()
    assert sum("haproxy" in process.name() for process in processes) == 2
    up.process.kill()
    up.process.wait()
    assert are_gone(processes)
    # What it could not clean up, the next one of this name does.
    again = start_up()
    again.wait_ready()


def test_a_port_in_use_is_said_at_once_and_nothing_stays(runtime: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps(tree()))
        result = run("up", str(config), "--set", f"gateway.bind=127.0.0.1:{port}")
    assert result.returncode == 2
    assert f"127.0.0.1:{port} is in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_up_gives_up_when_nothing_can_work(runtime: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF but not really")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree(model=str(damaged), engine="native")))
    result = run("up", str(config))
    assert result.returncode == 1
    assert "chat-1 is failed" in result.stderr
    assert os.listdir(runtime) == []
