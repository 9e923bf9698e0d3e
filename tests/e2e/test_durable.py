"""Durable streams of the real model: whole replicas are killed, no client gets anything else than usual."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from benchmarks.watched_streams import Ask, SteadyLoad, ask_all

from tests.e2e.conftest import RunningSystem, running, wait_until

pytestmark = pytest.mark.slow
CONFIG = """
endpoints:
  chat:
    model: smollm2-135m-instruct
    replicas: 2
    native: {num_threads: 1, kv_cache_mb: 96}
    streams: {durable: true}
"""
ASKS = [Ask(number, 5 + number, 24 + 4 * (number % 3), is_seeded=number % 2 == 1) for number in range(8)]
NUM_STREAMS = 5


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with running(CONFIG, tmp_path_factory.mktemp("run")) as system:
        yield system


def kill_whole(replica: dict[str, Any]) -> None:
    for pid in (replica["pid"], replica["engine_pid"]):
        with suppress(ProcessLookupError):  # engines die with their fronts
            os.kill(pid, signal.SIGKILL)


def kill_busiest(system: RunningSystem, load: SteadyLoad, count: int) -> None:
    """Kill so many replicas while streams flow; wait until as many streams as there are have ended since."""
    status = system.wait_ready()
    wait_until(lambda: any(len(r.pieces) >= 4 for r in list(load.open)), 30, "a stream flows")
    for replica in sorted(status["replicas"], key=lambda replica: -replica["num_running"])[:count]:
        kill_whole(replica)
    target = len(load.results) + NUM_STREAMS
    wait_until(lambda: len(load.results) >= target, 60, f"{target} streams have ended")


@pytest.mark.timeout(180)
def test_replicas_killed_whole_one_after_the_other_and_together_change_no_stream(
    system: RunningSystem,
) -> None:
    right = ask_all(system.url, ASKS)
    assert all(answer.is_done and not answer.error for answer in right), right
    assert {answer.replica_id for answer in right} == {"chat:g1-1"}
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        for num_killed in (1, 2):
            kill_busiest(system, load, num_killed)
    assert set(load.outcomes()) == {"same"}, load.wrong()
    (endpoint,) = system.wait_ready()["endpoints"]
    assert endpoint["failed_requests"] == endpoint["aborted"] == 0
