"""From zero to four replicas and back to zero under load: no request is lost, and each answer is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from benchmarks.watched_streams import Ask, SteadyLoad, StreamResult, ask_all

from tests.e2e.conftest import RunningSystem, running, wait_until

pytestmark = pytest.mark.slow
CONFIG = """
endpoints:
  chat:
    model: simulated
    engine: simulated
    replicas: {min: 0, max: 4}
    simulated: {step_ms: 10, start_s: 0.2}
    native: {max_running: 6}
    max_open: 6
    scaling: {down_after_s: 1, idle_to_zero_s: 2}
    streams: {handover_after_s: 0.2}
    drain_grace_s: 20
"""
ASKS = [Ask(number, 3 + number, 40 + number, is_seeded=True) for number in range(24)]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with running(CONFIG, tmp_path_factory.mktemp("run")) as system:
        yield system


def replicas(system: RunningSystem) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = system.status().get("replicas", [])
    return found


def wait_for_none(system: RunningSystem) -> None:
    wait_until(lambda: system.status() and not replicas(system), 60, "no replica is left")


@pytest.mark.timeout(240)
def test_from_zero_to_four_and_back_under_load_loses_no_request(system: RunningSystem) -> None:
    right: list[StreamResult] = ask_all(system.url, ASKS, 24)  # from zero, too
    assert all(answer.is_done and not answer.error for answer in right), right
    wait_for_none(system)
    with SteadyLoad(system.url, ASKS, right, 24) as load:
        wait_until(
            lambda: [replica["state"] for replica in replicas(system)] == ["ready"] * 4, 60, "four replicas"
        )
        with SteadyLoad(system.url, ASKS, right, 2) as little:
            load.end()
            wait_until(lambda: len(replicas(system)) == 1, 60, "one replica is enough for two streams")
            target = len(little.results) + 4
            wait_until(lambda: len(little.results) >= target, 30, "it serves")
    wait_for_none(system)
    assert set(load.outcomes()) == set(little.outcomes()) == {"same"}, load.wrong() + little.wrong()
    [endpoint] = system.status()["endpoints"]
    num_sent = len(ASKS) + len(load.results) + len(little.results)
    assert (endpoint["arrived"], endpoint["finished"]) == (num_sent, num_sent)
    ended = endpoint["refused"], endpoint["aborted"], endpoint["failed_requests"]
    assert (*ended, endpoint["num_held"], endpoint["num_in_flight"]) == (0, 0, 0, 0, 0)
