"""Streams of the real model through kills, drains and rollouts: no client gets anything else than usual."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.watched_streams import Ask, SteadyLoad, StreamResult, ask_all

from tests.e2e.conftest import RunningSystem, running, wait_until

pytestmark = pytest.mark.slow
CONFIG = """
endpoints:
  chat:
    model: smollm2-135m-instruct
    replicas: REPLICAS
    native: {num_threads: 1, kv_cache_mb: 96, token_budget: TOKEN_BUDGET}
    streams: {handover_after_s: 0.2}
    rollout: {traffic: [1.0], min_requests: 0, stage_s: 0}
    drain_grace_s: 60
"""
ASKS = [Ask(number, 5 + number, 24 + 4 * (number % 3), is_seeded=number % 2 == 1) for number in range(10)]
NUM_STREAMS = 6
READY_LIMIT_S = 60


def config(num_replicas: int = 2, token_budget: int = 256) -> str:
    """As many replicas as said, whatever the load: it is not scaling that is tested here."""
    return CONFIG.replace("REPLICAS", str(num_replicas)).replace("TOKEN_BUDGET", str(token_budget))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with running(config(), tmp_path_factory.mktemp("run")) as system:
        yield system


@pytest.fixture(scope="module")
def right(system: RunningSystem) -> list[StreamResult]:
    """What each request gives undisturbed."""
    answers = ask_all(system.url, ASKS)
    assert all(answer.is_done and not answer.error for answer in answers), answers
    assert len({answer.text for answer in answers}) == len(ASKS), "the answers must tell requests apart"
    return answers


def apply(system: RunningSystem, text: str, directory: Path) -> None:
    path = directory / "next.yaml"
    path.write_text(text)
    applied = system.command("apply", str(path), "--set", f"gateway.bind=127.0.0.1:{system.port}")
    assert applied.returncode == 0, applied.stderr


def replicas(system: RunningSystem) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = system.status().get("replicas", [])
    return found


def wait_for_ready(system: RunningSystem, count: int, generation_not: str = "") -> list[dict[str, Any]]:
    def ready() -> list[dict[str, Any]]:
        found = replicas(system)
        fit = [r for r in found if r["state"] == "ready" and r["generation"] != generation_not]
        return found if len(fit) == len(found) == count else []

    found: list[dict[str, Any]] = wait_until(ready, READY_LIMIT_S, f"{count} replicas are ready")
    return found


def wait_for_streams(load: SteadyLoad, num_pieces: int) -> None:
    """Wait until most streams run, one of which has had so many pieces of text."""

    def is_flowing() -> bool:
        flowing = [len(result.pieces) for result in list(load.open) if result.pieces]
        return len(flowing) >= NUM_STREAMS - 2 and max(flowing) >= num_pieces

    wait_until(is_flowing, 30, f"a stream has had {num_pieces} pieces")


def busiest(system: RunningSystem) -> dict[str, Any]:
    return max(replicas(system), key=lambda replica: int(replica["num_running"]))


def check(load: SteadyLoad) -> None:
    assert set(load.outcomes()) == {"same"}, load.wrong()


@pytest.mark.timeout(240)
def test_an_engine_killed_at_any_position_changes_no_stream(
    system: RunningSystem, right: list[StreamResult]
) -> None:
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        for number, num_pieces in enumerate((1, 3, 8, 16)):
            wait_for_ready(system, 2)
            wait_for_streams(load, num_pieces)
            # In turn: an engine that was killed lately is started again the later.
            os.kill(replicas(system)[number % 2]["engine_pid"], signal.SIGKILL)
        wait_for_next_wave(load)
    check(load)
    assert sum(replica["engine_restarts"] for replica in replicas(system)) == 4


@pytest.mark.timeout(240)
def test_both_engines_killed_at_once_change_no_stream(
    system: RunningSystem, right: list[StreamResult]
) -> None:
    wait_for_ready(system, 2)
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        wait_for_streams(load, 4)
        for replica in replicas(system):
            os.kill(replica["engine_pid"], signal.SIGKILL)
        wait_for_next_wave(load)
    check(load)


@pytest.mark.timeout(240)
def test_scaling_down_under_load_moves_its_streams(
    system: RunningSystem, right: list[StreamResult], tmp_path: Path
) -> None:
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        apply(system, config(3), tmp_path)
        wait_for_ready(system, 3)
        wait_for_streams(load, 4)
        apply(system, config(2), tmp_path)
        wait_for_ready(system, 2)
        wait_for_next_wave(load)
    check(load)


@pytest.mark.timeout(240)
def test_a_rollout_under_load_changes_no_stream(
    system: RunningSystem, right: list[StreamResult], tmp_path: Path
) -> None:
    before = wait_for_ready(system, 2)[0]["generation"]
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        wait_for_streams(load, 2)
        apply(system, config(token_budget=320), tmp_path)
        wait_for_ready(system, 2, generation_not=before)
        wait_for_next_wave(load)
    check(load)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("title", ["headrace: router", "headrace: controller"])
def test_killing_what_only_decides_changes_no_stream(
    system: RunningSystem, right: list[StreamResult], title: str
) -> None:
    wait_for_ready(system, 2)
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        wait_for_streams(load, 4)
        system.find_process(title).kill()
        wait_for_next_wave(load)
        wait_for_ready(system, 2)
        os.kill(busiest(system)["engine_pid"], signal.SIGKILL)  # what it had to know is known again
        wait_for_next_wave(load)
    check(load)


def wait_for_next_wave(load: SteadyLoad) -> None:
    """Wait until every stream that is open now has ended, and as many again."""
    target = len(load.results) + 2 * NUM_STREAMS
    done: Callable[[], bool] = lambda: len(load.results) >= target  # noqa: E731
    wait_until(done, 90, f"{target} streams have ended")
