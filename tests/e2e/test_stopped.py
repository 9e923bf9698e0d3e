"""Processes that hang (SIGSTOP) under load: for a second, and for ever. Every stream has one right answer.

What hangs for a second costs nothing. What hangs for ever is found and replaced, at the cost that
ARCHITECTURE.md's "When something dies" names. The engines are simulated; all other processes are real.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from benchmarks.watched_streams import Ask, SteadyLoad, StreamResult, ask_all

from tests.e2e.conftest import RunningSystem, running, wait_until

pytestmark = pytest.mark.slow
CONFIG = """
endpoints:
  chat:
    model: simulated
    engine: simulated
    replicas: 2
    simulated: {step_ms: 5}
  other:
    model: simulated
    engine: simulated
    replicas: {min: 0, max: 1}
"""
ASKS = [Ask(number, 3 + number, 30 + number, is_seeded=True) for number in range(16)]
NUM_STREAMS = 8
STOP_S = 1.0
"""How long a process that goes on stays stopped: longer than most checks, shorter than any limit."""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with running(CONFIG, tmp_path_factory.mktemp("run")) as system:
        yield system


@pytest.fixture(scope="module")
def right(system: RunningSystem) -> list[StreamResult]:
    answers = ask_all(system.url, ASKS, NUM_STREAMS)
    assert all(answer.is_done and not answer.error for answer in answers), answers
    assert len({answer.text for answer in answers}) == len(ASKS)
    return answers


def haproxy_worker(system: RunningSystem) -> psutil.Process:
    """HAProxy's worker, which has all connections; its parent only watches it."""
    found = [process for process in system.descendants() if "haproxy" in process.name()]
    [worker] = [process for process in found if process.ppid() in {other.pid for other in found}]
    return worker


VICTIMS: dict[str, Callable[[RunningSystem], psutil.Process]] = {
    "engine": lambda system: system.find_process("headrace: engine chat-1"),
    "front": lambda system: system.find_process("headrace: front chat-2"),
    "router": lambda system: system.find_process("headrace: router"),
    "HAProxy": haproxy_worker,
    "relay": lambda system: system.find_process("headrace: relay"),
    "controller": lambda system: system.find_process("headrace: controller"),
    "supervisor": lambda system: psutil.Process(system.process.pid),
}


def stop(process: psutil.Process) -> None:
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED, 5, f"{process} is stopped")


def wait_for_streams(load: SteadyLoad, num_more: int) -> None:
    target = len(load.results) + num_more
    wait_until(lambda: len(load.results) >= target, 60, f"{target} streams have ended")


def wait_replaced(system: RunningSystem, name: str, old_pid: int, timeout_s: float = 40) -> None:
    """Wait until the process that status calls `name` is another one, and all is ready."""

    def is_replaced() -> bool:
        status = system.status()
        pids = {process["name"]: process["pid"] for process in status.get("processes", [])}
        return bool(status.get("is_ready")) and pids.get(name, old_pid) not in (0, old_pid)

    wait_until(is_replaced, timeout_s, f"a new process {name!r}")


def pids(system: RunningSystem) -> dict[str, int]:
    return {process["name"]: process["pid"] for process in system.status()["processes"]}


def check_only_own_streams(load: SteadyLoad, at_most: int) -> None:
    """All streams are whole and right, but for so many that were cut, or found no connection."""
    outcomes = load.outcomes()
    assert set(outcomes) <= {"same", "cut", "refused"}, load.wrong()
    assert outcomes["cut"] + outcomes["refused"] <= at_most, load.wrong()
    assert outcomes["same"] > outcomes["cut"] + outcomes["refused"]


def test_whatever_stops_for_a_second_costs_no_stream_and_is_not_replaced(
    system: RunningSystem, right: list[StreamResult]
) -> None:
    before = pids(system)
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        for find in VICTIMS.values():
            wait_for_streams(load, NUM_STREAMS)
            victim = find(system)
            stop(victim)
            time.sleep(STOP_S)  # the fault itself
            victim.send_signal(signal.SIGCONT)
        wait_for_streams(load, 2 * NUM_STREAMS)
    assert set(load.outcomes()) == {"same"}, load.wrong()
    assert pids(system) == before


def test_a_front_and_a_relay_that_hang_are_replaced_and_only_the_fronts_streams_are_cut(
    system: RunningSystem, right: list[StreamResult]
) -> None:
    before = pids(system)
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        wait_for_streams(load, NUM_STREAMS)
        for name in ("front", "relay"):
            stop(VICTIMS[name](system))
        wait_for_streams(load, 4 * NUM_STREAMS)  # the other replica serves them
        wait_replaced(system, "front chat-2", before["front chat-2"])
        wait_replaced(system, "relay-g1", before["relay-g1"])
        wait_for_streams(load, 2 * NUM_STREAMS)
    check_only_own_streams(load, at_most=NUM_STREAMS)
    kept = ("controller", "router-g1", "haproxy-g1", "front chat-1")
    assert {name: pids(system)[name] for name in kept} == {name: before[name] for name in kept}


def test_a_haproxy_that_hangs_is_replaced_and_only_its_connections_are_cut(
    system: RunningSystem, right: list[StreamResult]
) -> None:
    before = pids(system)
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        wait_for_streams(load, NUM_STREAMS)
        stop(haproxy_worker(system))
        wait_replaced(system, "haproxy-g1", before["haproxy-g1"])
        wait_for_streams(load, 2 * NUM_STREAMS)
    refused = [result for result in load.results if result.status != 200]
    assert all("ConnectError" in result.error for result in refused[NUM_STREAMS:]), load.wrong()
    cut = [result for result in load.results if result.status == 200 and not result.is_done]
    assert len(cut) <= NUM_STREAMS, load.wrong()
    assert not {"different", "error"} & set(load.outcomes()), load.wrong()
    assert {**pids(system), "haproxy-g1": 0} == {**before, "haproxy-g1": 0}


def test_a_controller_that_hangs_is_replaced_and_touches_nothing(
    system: RunningSystem, right: list[StreamResult]
) -> None:
    before = pids(system)
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        wait_for_streams(load, NUM_STREAMS)
        stop(VICTIMS["controller"](system))
        wait_replaced(system, "controller", before["controller"])
        wait_for_streams(load, 2 * NUM_STREAMS)
    assert set(load.outcomes()) == {"same"}, load.wrong()
    assert {**pids(system), "controller": 0} == {**before, "controller": 0}


def test_a_supervisor_that_hangs_costs_nothing_and_its_kill_ends_everything(
    system: RunningSystem, right: list[StreamResult]
) -> None:
    """Runs last."""
    processes = system.descendants()
    with SteadyLoad(system.url, ASKS, right, NUM_STREAMS) as load:
        stop(VICTIMS["supervisor"](system))
        wait_for_streams(load, 4 * NUM_STREAMS)
    assert set(load.outcomes()) == {"same"}, load.wrong()
    system.process.kill()
    system.process.wait(10)
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []
