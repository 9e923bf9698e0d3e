"""The supervisor with real processes: what it starts ends with it, whatever ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from headrace.api.messages import (
    LauncherError,
    LauncherEvent,
    ProcessEnded,
    Processes,
    ProcessSpec,
    ProcessStarted,
)
from headrace.fabric.local import LauncherLost, LocalLauncher
from headrace.fabric.supervisor import Supervisor

SLEEPER = "import signal, time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True);"
    " time.sleep(600)"
)
WITH_GRANDCHILD = (
    "import subprocess, sys, time;"
    " c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    " print(c.pid, flush=True); time.sleep(600)"
)
LIMIT_S = 10.0


def python(name: str, code: str, directory: Path) -> ProcessSpec:
    return ProcessSpec(name, [sys.executable, "-S", "-c", code], log_path=str(directory / f"{name}.log"))


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_there(path: Path) -> bool:
    return path.exists()


async def eventually(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        await asyncio.sleep(0.01)


async def printed(directory: Path, name: str) -> str:
    """Wait for the first line of a process's log."""
    log = directory / f"{name}.log"
    await eventually(lambda: log.exists() and "\n" in log.read_text())
    return log.read_text().splitlines()[0]


class Rig:
    """A supervisor in this process whose controller is the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notices: list[str] = []
        self.supervisor = Supervisor(directory, python("controller", SLEEPER, directory), self.notices.append)
        self.task = asyncio.create_task(self.supervisor.run())

    async def connect(self) -> LocalLauncher:
        await printed(self.directory, "controller")
        self.launcher = await LocalLauncher.connect(self.directory)
        return self.launcher

    async def event(self) -> LauncherEvent:
        return await asyncio.wait_for(self.launcher.next_event(), LIMIT_S)

    async def all_events(self) -> None:
        while True:
            await self.event()

    async def start(self, name: str, code: str) -> int:
        self.launcher.start(python(name, code, self.directory))
        event = await self.event()
        assert isinstance(event, ProcessStarted)
        await printed(self.directory, name)
        return event.process.pid


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    await rig.connect()
    yield rig
    rig.launcher.close()
    if not rig.task.done():
        rig.supervisor.stop("end of the test")
        rig.supervisor.stop("now")
    await asyncio.wait_for(rig.task, LIMIT_S)


@pytest.mark.slow
async def test_a_started_process_is_listed_and_its_end_is_pushed_with_its_last_lines(rig: Rig) -> None:
    pid = await rig.start(
        "worker", "print('first'); print('last words'); import sys; sys.stdin.read(); sys.exit(3)"
    )
    event = await rig.event()
    assert isinstance(event, ProcessEnded)
    assert event.process.pid == pid
    assert event.process.exit_code == 3
    assert event.process.last_output == "first\nlast words"
    rig.launcher.list_processes()
    event = await rig.event()
    assert isinstance(event, Processes)
    assert [process.name for process in event.processes] == ["controller"]


@pytest.mark.slow
async def test_a_process_whose_log_cannot_be_opened_runs_without_one(rig: Rig) -> None:
    spec = python("worker", SLEEPER, rig.directory / "missing")
    rig.launcher.start(spec)
    assert isinstance(await rig.event(), ProcessStarted)


@pytest.mark.slow
async def test_bad_commands_get_an_error_and_change_nothing(rig: Rig) -> None:
    await rig.start("worker", SLEEPER)
    rig.launcher.start(python("worker", SLEEPER, rig.directory))
    rig.launcher.stop("nobody", 1.0)
    rig.launcher.stop("controller", 1.0)
    rig.launcher.start(ProcessSpec("absent", ["/no/such/program"]))
    errors = [await rig.event() for _ in range(4)]
    assert [error.name for error in errors if isinstance(error, LauncherError)] == [
        "worker",
        "nobody",
        "controller",
        "absent",
    ]
    rig.launcher.list_processes()
    event = await rig.event()
    assert isinstance(event, Processes)
    assert {process.name for process in event.processes} == {"controller", "worker"}


@pytest.mark.slow
async def test_stop_signals_first_and_kills_the_whole_group_after_the_grace(rig: Rig) -> None:
    await rig.start("polite", SLEEPER)
    rig.launcher.stop("polite", 30.0)
    event = await rig.event()
    assert isinstance(event, ProcessEnded)
    assert event.process.exit_code == -signal.SIGTERM
    await rig.start("stubborn", STUBBORN)
    rig.launcher.stop("stubborn", 30.0)
    rig.launcher.stop("stubborn", 0.1)  # a second stop brings the end forward
    rig.launcher.stop("stubborn", 60.0)  # and cannot push it back
    event = await rig.event()
    assert isinstance(event, ProcessEnded)
    assert event.process.exit_code == -signal.SIGKILL


@pytest.mark.slow
async def test_what_a_process_leaves_in_its_group_is_killed_when_it_ends(rig: Rig) -> None:
    pid = await rig.start("parent", WITH_GRANDCHILD)
    grandchild = int(await printed(rig.directory, "parent"))
    os.kill(pid, signal.SIGKILL)
    await rig.event()
    await eventually(lambda: is_gone(grandchild))


@pytest.mark.slow
async def test_a_controller_that_is_killed_is_started_again_and_nothing_else_is_touched(rig: Rig) -> None:
    worker = await rig.start("worker", SLEEPER)
    rig.launcher.list_processes()
    event = await rig.event()
    assert isinstance(event, Processes)
    first = next(process.pid for process in event.processes if process.name == "controller")
    os.kill(first, signal.SIGKILL)
    assert isinstance(await rig.event(), ProcessEnded)
    pids: dict[str, int] = {}
    while "controller" not in pids:
        rig.launcher.list_processes()
        event = await rig.event()
        assert isinstance(event, Processes)
        pids = {process.name: process.pid for process in event.processes}
        await asyncio.sleep(0.02)
    assert pids["worker"] == worker
    assert pids["controller"] != first
    assert rig.supervisor.controller_failures == 1


@pytest.mark.slow
async def test_a_controller_that_hangs_is_killed_and_started_again_and_one_that_speaks_is_not(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await rig.start("worker", SLEEPER)
    monkeypatch.setattr("headrace.fabric.supervisor.CONTROLLER_HUNG_S", 0.6)
    for _ in range(10):  # the limit twice over
        rig.launcher.list_processes()
        assert isinstance(await rig.event(), Processes)
        await asyncio.sleep(0.12)
    ended = await rig.event()
    assert isinstance(ended, ProcessEnded)
    assert (ended.process.name, ended.process.exit_code) == ("controller", -signal.SIGKILL)
    assert any("the controller has said nothing" in notice for notice in rig.notices)
    assert not is_gone(worker)
    await eventually(lambda: "controller" in rig.supervisor._children)


@pytest.mark.slow
async def test_a_stop_ends_everything_when_the_controller_ends_or_a_second_stop_comes(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.connect()
    worker = await rig.start("worker", SLEEPER)
    stubborn = await rig.start("stubborn", STUBBORN)
    rig.supervisor.stop("first")
    await eventually(lambda: is_gone(worker))  # the controller obeyed, so the supervisor stops the rest
    assert not is_gone(stubborn)
    rig.supervisor.stop("second")
    await asyncio.wait_for(rig.task, LIMIT_S)
    assert is_gone(stubborn)
    with pytest.raises(LauncherLost):
        await rig.all_events()
    assert not is_there(tmp_path / "supervisor.sock")


@pytest.mark.slow
async def test_a_controller_that_says_nothing_while_stopping_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.fabric.supervisor.CONTROLLER_SILENCE_S", 0.3)
    notices: list[str] = []
    supervisor = Supervisor(tmp_path, python("controller", STUBBORN, tmp_path), notices.append)
    task = asyncio.create_task(supervisor.run())
    await printed(tmp_path, "controller")
    supervisor.stop("asked")
    await asyncio.wait_for(task, LIMIT_S)
    assert any("said nothing" in notice for notice in notices)


@pytest.mark.slow
async def test_a_controller_that_keeps_ending_is_counted_and_a_stop_does_not_wait_for_its_back_off(
    tmp_path: Path,
) -> None:
    notices: list[str] = []
    crashing = python("controller", "print('no config'); raise SystemExit(3)", tmp_path)
    supervisor = Supervisor(tmp_path, crashing, notices.append)
    task = asyncio.create_task(supervisor.run())
    await eventually(lambda: supervisor.controller_failures == 3)
    assert supervisor.controller_last_output == "no config"
    assert [notice.rsplit(" in ", 1)[1] for notice in notices] == ["0.2 s", "0.4 s", "0.8 s"]
    supervisor.stop("enough")
    await asyncio.wait_for(task, 0.5)


@pytest.mark.slow
async def test_a_controller_that_cannot_be_started_at_all_is_an_error(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, ProcessSpec("controller", ["/no/such/program"]), lambda notice: None)
    with pytest.raises(FileNotFoundError):
        await asyncio.wait_for(supervisor.run(), LIMIT_S)
    assert not is_there(tmp_path / "supervisor.sock")


@pytest.mark.slow
def test_a_supervisor_that_is_killed_takes_everything_with_it_within_a_second(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import asyncio, sys
        from pathlib import Path
        from headrace.api.messages import ProcessSpec
        from headrace.fabric.supervisor import Supervisor
        spec = ProcessSpec("controller", [sys.executable, "-S", "-c", {SLEEPER!r}])
        supervisor = Supervisor(Path({str(tmp_path)!r}), spec, print)
        asyncio.run(supervisor.run())
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"  # from the controller
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    deadline_s = time.monotonic() + 1.0
    while not all(is_gone(child.pid) for child in children):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
