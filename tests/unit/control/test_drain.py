"""The end of a system: what is stopped, within which times, and what a restarted controller knows of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.api.config import Config
from headrace.api.messages import ProcessSpec, ProcessState, Shutdown
from headrace.clock import SystemClock
from headrace.control.admin import ask
from headrace.control.app import Controller
from headrace.control.drain import MARGIN_S, drain
from headrace.control.process_sources import ProcessSources
from headrace.control.reconciler import StartReplica
from headrace.control.system_state import SystemState
from headrace.fabric.launcher import FakeLauncher

CONFIG = Config.model_validate(
    {
        "endpoints": {
            "chat": {"model": "m", "engine": "simulated", "drain_grace_s": 20.0, "replicas": {"min": 1}}
        },
        "gateway": {"bind": "127.0.0.1:0"},
        "state_dir": "",
    }
)
LIMIT_S = 10.0


def _no_program(*names: str) -> list[ProcessSpec]:
    return [ProcessSpec(name, []) for name in names]


async def _stops_of(state: SystemState) -> dict[str, float]:
    """Drain, let everything that is stopped end at once, and return the times that it was given."""
    launcher, wake, clock = FakeLauncher(), asyncio.Event(), SystemClock()
    for slot in state.slots:
        launcher.start(ProcessSpec(slot.replica_id, []))
    launcher.take_events()
    task = asyncio.create_task(drain(launcher, state, wake, clock))
    await asyncio.sleep(0)
    stops = dict(launcher.stopping)
    for name in stops:
        state.fleet.on_ended(ProcessState(name, 0, False, 0), clock.now_s())
    wake.set()
    async with asyncio.timeout(LIMIT_S):
        await task
    return stops


def test_a_replica_that_was_taken_over_and_not_heard_of_yet_has_its_whole_grace() -> None:
    """Its controller began a moment ago: it may have open streams all the same."""
    state = SystemState(CONFIG, 0.0)
    state.adopt([ProcessState("chat-1", 7, is_alive=True)], 0.0)
    assert asyncio.run(_stops_of(state)) == {"chat-1": 20.0 + MARGIN_S}


def test_a_replica_that_starts_is_not_waited_for() -> None:
    state = SystemState(CONFIG, 0.0)
    state.fleet.start(StartReplica("chat-1", "chat", "g", "wanted"), 20.0, 0.0)
    assert asyncio.run(_stops_of(state)) == {"chat-1": 1.0}


def _controller(run_directory: Path, launcher: FakeLauncher) -> Controller:
    sources = ProcessSources(
        lambda spec: _no_program("router-g1", "haproxy-g1", "relay-g1"),
        lambda spec: _no_program("router-g1", "haproxy-g1", "relay-g1"),
        lambda *arguments: ProcessSpec(arguments[2], []),
    )
    return Controller(run_directory, CONFIG, launcher, sources, SystemClock())


async def _end_with_a_second_controller(run_directory: Path) -> FakeLauncher:
    launcher = FakeLauncher()
    async with asyncio.timeout(LIMIT_S):
        first = asyncio.create_task(_controller(run_directory, launcher).run())
        while "chat-1" not in launcher.alive:  # noqa: ASYNC110, nothing tells of a fake's processes
            await asyncio.sleep(0.01)
        reply = await asyncio.to_thread(ask, run_directory, Shutdown())
        assert reply.notes == ["draining"]
        first.cancel()
        await asyncio.wait([first])
        launcher.take_events()
        launcher.stopping.clear()

        second = asyncio.create_task(_controller(run_directory, launcher).run())
        while not second.done():
            for name in list(launcher.stopping):
                launcher.end(name)
            await asyncio.sleep(0.01)
        second.result()
    return launcher


@pytest.mark.slow
def test_a_controller_that_begins_while_the_system_ends_goes_on_with_the_end(tmp_path: Path) -> None:
    """`headrace down` was heard by one that died before all had ended."""
    launcher = asyncio.run(_end_with_a_second_controller(tmp_path))
    assert not launcher.alive
    assert launcher.num_started == 4
