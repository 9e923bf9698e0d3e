"""A whole system with one replica on standby: the router uses the others, and the CLI's words work."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import headrace
from headrace.api.messages import SleepReplica
from headrace.control.admin import CommandRefused, ask
from headrace.control.serve import System

pytestmark = pytest.mark.slow
LIMIT_S = 40.0
TREE = {
    "endpoints": {
        "chat": {
            "model": "simulated",
            "engine": "simulated",
            "simulated": {"step_ms": 2},
            "replicas": {"min": 2, "max": 2},
        }
    },
    "gateway": {"bind": "127.0.0.1:0"},
}
BODY = {"model": "chat", "max_tokens": 8, "messages": [{"role": "user", "content": "Go"}]}


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="hr-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        monkeypatch.setenv("XDG_STATE_HOME", str(Path(name) / "state"))
        with headrace.serve(TREE) as system:
            system.wait_until_ready(LIMIT_S)
            yield system


def wait_states(system: System, states: list[str]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while (found := sorted(replica.state for replica in system.status().replicas)) != states:
        assert time.monotonic() < deadline_s, f"{found}, and not {states}"
        time.sleep(0.05)


async def test_a_replica_sleeps_and_wakes_under_load_without_a_failed_request(system: System) -> None:
    outcomes: Counter[int] = Counter()
    is_over = False

    async def client() -> None:
        async with httpx.AsyncClient(verify=False, timeout=30) as http:
            while not is_over:
                answer = await http.post(f"{system.url}/chat/completions", json=BODY)
                outcomes[answer.status_code] += 1

    clients = [asyncio.create_task(client()) for _ in range(3)]
    for _ in range(2):
        await sleep_at_last(system)
        num_before = outcomes.total()
        while outcomes.total() < num_before + 20:  # noqa: ASYNC110, of three clients
            await asyncio.sleep(0.02)
        assert [r.state for r in system.status().replicas if r.replica_id == "chat-2"] == ["standby"]
        ask(system.run_directory, SleepReplica("chat-2", 0))
        await asyncio.to_thread(wait_states, system, ["ready", "ready"])
    is_over = True
    await asyncio.gather(*clients)
    assert list(outcomes) == [200], outcomes


async def sleep_at_last(system: System) -> None:
    """Under load a replica may have a request open when it is asked: then it is asked again."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        ask(system.run_directory, SleepReplica("chat-2", 1))
        for _ in range(20):
            if any(r.state == "standby" and r.phase.startswith("asleep") for r in system.status().replicas):
                return
            await asyncio.sleep(0.02)
    raise AssertionError(system.status())


def test_the_command_line_says_what_was_done_and_what_is_not_there(system: System) -> None:
    name = system.run_directory.name
    for words in (["sleep", "chat-1", "--level", "2"], ["wake", "chat-1"]):
        done = subprocess.run(
            [sys.executable, "-m", "headrace", *words, "--name", name],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.stdout.startswith("chat-1 was told to "), done.stderr
    with pytest.raises(CommandRefused, match="no replica 'chat-9' reports; replicas are: chat-1, chat-2"):
        ask(system.run_directory, SleepReplica("chat-9", 1))
