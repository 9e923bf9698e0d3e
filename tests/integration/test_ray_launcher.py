"""The launcher for clusters with real hosts, keepers and processes, on a cluster that tests play."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import pytest

from headrace.api.messages import (
    LauncherError,
    LauncherEvent,
    NodeNeeds,
    Nodes,
    NodeState,
    Place,
    ProcessEnded,
    Processes,
    ProcessSpec,
    ProcessStarted,
    ProcessWaiting,
    StartProcess,
)
from headrace.api.run_paths import PYTHON_PLACEHOLDER, RUN_DIR_PLACEHOLDER
from headrace.clock import SystemClock
from headrace.fabric import host_link, rank_hosts, ray_launcher, retirement
from headrace.fabric.cluster import HostSilent
from headrace.fabric.fake_cluster import FakeCluster
from headrace.fabric.host_messages import HostEvent, HostEvents, HostReport
from headrace.fabric.local import LauncherLost
from headrace.fabric.ray_host import Host
from headrace.fabric.ray_launcher import RayLauncher

pytestmark = pytest.mark.usefixtures("short_place")
LIMIT_S = 20.0
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
BEATING = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.2)"
SLEEPER = [PYTHON_PLACEHOLDER, "-S", "-c", "import time; time.sleep(600)"]
HERE = NodeState("here", "10.0.0.1", True, {"CPU": 2.0}, {}, {"kind": "head"})
THERE = NodeState("there", "10.0.0.1", True, {"CPU": 2.0}, {}, {"kind": "spot"})


def shorten(
    monkeypatch: pytest.MonkeyPatch, *, silent_after_s: float, lost_after_s: float, poll_s: float
) -> None:
    """Notice silence sooner than a real cluster's busy nodes allow."""
    for module in (host_link, rank_hosts):
        monkeypatch.setattr(module, "SILENT_AFTER_S", silent_after_s)
        monkeypatch.setattr(module, "LOST_AFTER_S", lost_after_s)
        monkeypatch.setattr(module, "POLL_S", poll_s)


def make_cluster(*nodes: NodeState) -> FakeCluster:
    return FakeCluster(lambda group, node, _: Host("demo", group, node.node_id, node.address), list(nodes))


@asynccontextmanager
async def launched(cluster: FakeCluster) -> AsyncIterator[RayLauncher]:
    """A launcher; at the end its hosts are released, and nothing of them is left."""
    launcher = await RayLauncher.connect(cluster, SystemClock(), b"")
    try:
        yield launcher
    finally:
        launcher.close()
        cluster.failure = ""
        for key in await cluster.hosts():
            await cluster.release(key)
        parent = Path(tempfile.gettempdir())
        await until(lambda: not any(parent.glob("headrace-*/*")))


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110, processes of other programs raise no events here
            await asyncio.sleep(0.02)


async def take(launcher: RayLauncher, kind: type) -> LauncherEvent:
    """The next event of `kind`; what is told of nodes and waits in between is let go."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            event = await launcher.next_event()
            if isinstance(event, kind):
                return event
            assert isinstance(event, Nodes | ProcessWaiting), event


def sleeper(name: str, *choices: NodeNeeds, group: str = "", **fields: object) -> ProcessSpec:
    place = Place(list(choices)) if choices else None
    return msgspec.structs.replace(ProcessSpec(name, SLEEPER, place=place, group=group), **fields)


async def started(launcher: RayLauncher, spec: ProcessSpec) -> int:
    launcher.start(spec)
    event = await take(launcher, ProcessStarted)
    assert isinstance(event, ProcessStarted)
    assert event.process.name == spec.name
    return event.process.pid


@pytest.mark.slow
async def test_replicas_of_an_endpoint_are_spread_over_the_nodes() -> None:
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        for number in (1, 2):  # at the same moment: the second one knows where the first one is going to be
            launcher.start(sleeper(f"chat-{number}", NodeNeeds({"CPU": 1.0})))
        for _ in range(2):
            await take(launcher, ProcessStarted)
        assert sorted(cluster.liked) == ["here", "there"]
        launcher.list_processes()
        event = await take(launcher, Processes)
        assert isinstance(event, Processes)
        assert sorted(process.name for process in event.processes) == ["chat-1", "chat-2"]


@pytest.mark.slow
async def test_replicas_that_are_started_at_the_same_time_are_spread_too() -> None:
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        for number in (1, 2):
            launcher.start(sleeper(f"chat-{number}", NodeNeeds({"CPU": 1.0})))
        for _ in (1, 2):
            await take(launcher, ProcessStarted)
        assert sorted(cluster.liked) == ["here", "there"]


@pytest.mark.slow
async def test_a_process_gets_the_run_directory_and_the_python_of_its_host(tmp_path: Path) -> None:
    cluster = make_cluster(HERE)
    program = (
        f"import sys; open({str(tmp_path / 'said')!r}, 'w').write(' '.join([sys.executable, *sys.argv[1:]]))"
    )
    spec = ProcessSpec(
        "chat-1",
        [PYTHON_PLACEHOLDER, "-S", "-c", program, f"{RUN_DIR_PLACEHOLDER}/controller.sock"],
        log_path=f"{RUN_DIR_PLACEHOLDER}/logs/chat-1.log",
        files={"config.json": "{}"},
    )
    async with launched(cluster) as launcher:
        await started(launcher, spec)
        event = await take(launcher, ProcessEnded)
        assert isinstance(event, ProcessEnded)
        assert event.process.exit_code == 0
        python, path = (tmp_path / "said").read_text().split()
        assert python == sys.executable
        assert path.startswith(f"{tempfile.gettempdir()}/headrace-{os.getuid()}/ray-demo-")
        assert path.endswith("/controller.sock")


@pytest.mark.slow
async def test_a_host_goes_with_its_last_process_and_its_place_is_given_back() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        await started(launcher, sleeper("router-g1", group="gateway-g1"))
        await started(launcher, sleeper("haproxy-g1", group="gateway-g1"))
        assert len(cluster.running) == 1
        launcher.stop("router-g1", 5.0)
        event = await take(launcher, ProcessEnded)
        assert isinstance(event, ProcessEnded)
        assert (event.process.name, event.process.exit_code) == ("router-g1", -15)
        assert len(cluster.running) == 1
        launcher.stop("haproxy-g1", 0.0)
        await take(launcher, ProcessEnded)
        await until(lambda: not cluster.running)
        pid = await started(launcher, sleeper("router-g1", group="gateway-g1"))  # at once again
        assert psutil.pid_exists(pid)


@pytest.mark.slow
async def test_a_restarted_controller_finds_what_runs_and_touches_nothing() -> None:
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as first:
        pid = await started(first, sleeper("chat-1", NodeNeeds({"CPU": 1.0})))
        first.close()
        second = await RayLauncher.connect(cluster, SystemClock(), b"")
        second.list_processes()
        event = await take(second, Processes)
        assert isinstance(event, Processes)
        assert [(process.name, process.pid) for process in event.processes] == [("chat-1", pid)]
        second.start(sleeper("chat-1"))
        refusal = await take(second, LauncherError)
        assert isinstance(refusal, LauncherError)
        assert "is running" in refusal.error
        second.stop("chat-1", 5.0)
        ended = await take(second, ProcessEnded)
        assert isinstance(ended, ProcessEnded)
        assert (ended.process.pid, ended.process.exit_code) == (pid, -15)
        second.close()


@pytest.mark.slow
async def test_a_lost_node_ends_its_processes_with_the_reason() -> None:
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "spot"})))
        host, _ = next(iter(cluster.running.values()))
        cluster.lose_node("there")
        host.end()
        event = await take(launcher, ProcessEnded)
        assert isinstance(event, ProcessEnded)
        assert (event.process.name, event.process.pid, event.process.exit_code) == ("chat-1", pid, None)
        assert "its node is gone" in event.process.last_output
        assert event.process.node == "there"


@pytest.mark.slow
async def test_a_silent_node_is_told_of_and_given_up_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch, silent_after_s=0.3, lost_after_s=1.0, poll_s=0.1)
    monkeypatch.setattr(retirement, "SILENT_LIMIT_S", 0.2)
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "spot"})))
        cluster.silent.add("there")
        event = await take(launcher, ProcessWaiting)
        assert isinstance(event, ProcessWaiting)
        assert "has not answered for 0." in event.reason
        assert psutil.pid_exists(pid)
        cluster.silent.clear()
        await asyncio.sleep(0.5)  # more than what was left of its time
        assert psutil.pid_exists(pid)
        cluster.silent.add("there")
        ended = await take(launcher, ProcessEnded)
        assert isinstance(ended, ProcessEnded)
        assert "has not answered for 1 s" in ended.process.last_output
        await until(lambda: not psutil.pid_exists(pid))


@pytest.mark.slow
async def test_a_silent_node_that_was_cut_off_and_is_back_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch, silent_after_s=0.1, lost_after_s=1.0, poll_s=0.05)
    can_reach = False

    async def reach(_self: RayLauncher, _address: str) -> bool:
        return can_reach

    monkeypatch.setattr(RayLauncher, "_can_reach", reach)
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "spot"})))
        cluster.silent.add("there")
        await take(launcher, ProcessWaiting)
        can_reach = True
        event = await take(launcher, ProcessWaiting)  # which bears no end
        while not (isinstance(event, ProcessWaiting) and event.reason.endswith("answered for 1.3 s")):
            event = await take(launcher, ProcessWaiting)
        cluster.silent.clear()
        (link,) = launcher._links.values()
        await until(lambda: not link.is_silent)
        assert psutil.pid_exists(pid)
        cluster.silent.add("there")
        assert isinstance(await take(launcher, ProcessEnded), ProcessEnded), "it could be reached, and hung"


@pytest.mark.slow
async def test_nothing_is_placed_on_a_node_without_power_that_the_cluster_takes_for_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_there = True

    async def answers(_address: str, _limit_s: float) -> bool:
        return is_there

    monkeypatch.setattr(ray_launcher, "answers", answers)
    monkeypatch.setattr(ray_launcher, "PROBE_LIMIT_S", 0.02)
    monkeypatch.setattr(RayLauncher, "_tunnels_at", lambda _self, address: f"{address}:1")
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        await started(launcher, sleeper("fuller-1", NodeNeeds({"CPU": 1.0}, {"kind": "head"})))
        for is_there, where in ((True, "there"), (False, "here")):
            await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 0.1}, {"kind": "spot"})))
            (key,) = [key for key in await cluster.hosts() if key.startswith("chat-1")]
            cluster.unavailable.add(key)
            await take(launcher, ProcessEnded)
            await until(lambda is_there=is_there: bool(launcher._given_up) != is_there)
            await started(launcher, sleeper(f"{where}-1", NodeNeeds({"CPU": 0.1})))
            assert cluster.liked.pop() == where
        is_there = True
        await until(lambda: not launcher._given_up)
        await started(launcher, sleeper("again-1", NodeNeeds({"CPU": 0.1})))
        assert cluster.liked.pop() == "there"


@pytest.mark.slow
async def test_nothing_is_placed_on_a_node_that_is_silent_though_the_cluster_takes_it_for_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch, silent_after_s=0.1, lost_after_s=4.0, poll_s=0.05)
    monkeypatch.setattr(retirement, "SILENT_LIMIT_S", 0.1)
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        await started(launcher, sleeper("fuller-1", NodeNeeds({"CPU": 1.0}, {"kind": "head"})))
        await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 0.1}, {"kind": "spot"})))
        cluster.silent.add("there")
        await take(launcher, ProcessWaiting)
        await started(launcher, sleeper("silent-1", NodeNeeds({"CPU": 0.1})))
        assert cluster.liked.pop() == "here"
        await take(launcher, ProcessEnded)
        await until(lambda: len(cluster.running) == 2)  # its place was given back
        await started(launcher, sleeper("given-1", NodeNeeds({"CPU": 0.1})))
        assert cluster.liked.pop() == "here"


@pytest.mark.slow
async def test_what_a_host_holds_that_is_heard_of_again_after_it_was_given_up_is_asked_to_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shorten(monkeypatch, silent_after_s=0.1, lost_after_s=0.3, poll_s=0.1)
    monkeypatch.setattr(retirement, "CALL_LIMIT_S", 0.2)
    finishing = (
        f"import pathlib, signal, sys, time; path = pathlib.Path({str(tmp_path)!r}); "
        "signal.signal(signal.SIGTERM, lambda *_: ((path / 'done').touch(), sys.exit(0))); "
        "(path / 'ready').touch(); time.sleep(600)"
    )
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        spec = sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "spot"}))
        pid = await started(
            launcher, msgspec.structs.replace(spec, argv=[PYTHON_PLACEHOLDER, "-c", finishing])
        )
        await until((tmp_path / "ready").exists)
        cluster.silent.add("there")
        await take(launcher, ProcessEnded)
        again = await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "head"})))
        assert psutil.pid_exists(pid)
        cluster.silent.clear()
        await until(lambda: len(cluster.running) == 1)
        assert (tmp_path / "done").exists()
        assert not psutil.pid_exists(pid)
        assert psutil.pid_exists(again)


@pytest.mark.slow
async def test_what_fits_nowhere_waits_says_why_and_starts_when_a_node_comes() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        launcher.start(sleeper("chat-1", NodeNeeds({"CPU": 4.0})))
        event = await take(launcher, ProcessWaiting)
        assert isinstance(event, ProcessWaiting)
        assert event.name == "chat-1"
        assert "CPU 4 is asked" in event.reason
        assert "the most that one has is CPU 2" in event.reason
        cluster.add_node(NodeState("large", "10.0.0.1", True, {"CPU": 8.0}))
        started_event = await take(launcher, ProcessStarted)
        assert isinstance(started_event, ProcessStarted)
        assert started_event.process.node == "large"


@pytest.mark.slow
async def test_the_second_choice_is_taken_when_the_first_does_not_come_in_time() -> None:
    cluster = make_cluster(HERE)
    choices = NodeNeeds({"CPU": 1.0}, {"kind": "spot"}, wait_s=0.2), NodeNeeds({"CPU": 1.0}, {"kind": "head"})
    async with launched(cluster) as launcher:
        launcher.start(sleeper("chat-1", *choices))
        event = await take(launcher, ProcessStarted)
        assert isinstance(event, ProcessStarted)
        assert event.process.node == "here"


async def test_one_that_waits_for_a_place_can_be_stopped() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        launcher.start(sleeper("chat-1", NodeNeeds({"CPU": 4.0})))
        await until(cluster.liked.__len__)
        launcher.stop("chat-1", 5.0)
        event = await take(launcher, ProcessEnded)
        assert isinstance(event, ProcessEnded)
        assert "never had a place" in event.process.last_output
        await until(lambda: not cluster._reserved)


@pytest.mark.slow
async def test_a_cluster_that_does_not_answer_fails_the_start_and_not_the_launcher() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        cluster.failure = "Ray has not answered for 15 s"
        launcher.start(sleeper("chat-1", NodeNeeds({"CPU": 1.0})))
        event = await take(launcher, LauncherError)
        assert isinstance(event, LauncherError)
        assert event.error == cluster.failure
        cluster.failure = ""
        await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 1.0})))
    cluster.failure = "refused"
    with pytest.raises(LauncherLost, match="refused"):
        await RayLauncher.connect(cluster, SystemClock(), b"")


@pytest.mark.slow
async def test_a_program_that_does_not_exist_is_an_error_of_its_process_alone() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, sleeper("relay-g1", group="gateway-g1"))
        launcher.start(ProcessSpec("haproxy-g1", ["/nowhere/haproxy"], group="gateway-g1"))
        event = await take(launcher, LauncherError)
        assert isinstance(event, LauncherError)
        assert "/nowhere/haproxy cannot be started" in event.error
        assert psutil.pid_exists(pid)


@pytest.mark.slow
async def test_a_killed_keeper_ends_its_processes_and_is_told() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 1.0})))
        parent = psutil.Process(pid).parent()
        assert parent is not None
        parent.kill()
        event = await take(launcher, ProcessEnded)
        assert isinstance(event, ProcessEnded)
        assert "its keeper ended with -9" in event.process.last_output
        await until(lambda: not psutil.pid_exists(pid))


@pytest.mark.slow
async def test_a_place_that_could_not_be_given_back_is_given_back_later() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        launcher.start(sleeper("chat-1", NodeNeeds({"CPU": 4.0})))
        await until(cluster.liked.__len__)
        cluster.failure = "Ray has not answered for 15 s"
        await take(launcher, LauncherError)
        assert cluster._reserved
        cluster.failure = ""
        await until(lambda: not cluster._reserved)


async def test_one_that_is_stopped_before_its_turn_starts_nothing() -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        launcher.start(sleeper("router-g1", group="gateway-g1"))
        launcher.stop("router-g1", 5.0)
        event = await take(launcher, ProcessEnded)
        assert isinstance(event, ProcessEnded)
        assert "never had a place" in event.process.last_output
        assert not cluster.running


@pytest.mark.slow
async def test_nothing_is_put_on_a_node_that_is_drained_or_has_a_notice() -> None:
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        cluster.drain_node("there", 4e9)
        while True:
            event = await take_nodes(launcher)
            if any(node.is_draining for node in event.nodes):
                break
        launcher.start(sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "spot"})))
        waits = await take(launcher, ProcessWaiting)
        assert isinstance(waits, ProcessWaiting)
        assert waits.reason.endswith("Nothing is put on nodes that go away or do not answer: there")
        notice = Place([NodeNeeds({"CPU": 1.0})], avoided={"here": 1.5})
        launcher.start(msgspec.structs.replace(sleeper("talk-1"), place=notice))
        started_event = await take(launcher, ProcessStarted)
        assert isinstance(started_event, ProcessStarted)
        assert (started_event.process.name, started_event.process.node) == ("talk-1", "here")
        assert cluster.liked[-2:] == ["", "here"], "once its notice was over"


async def take_nodes(launcher: RayLauncher) -> Nodes:
    async with asyncio.timeout(LIMIT_S):
        while True:
            event = await launcher.next_event()
            if isinstance(event, Nodes):
                return event


@pytest.mark.slow
async def test_a_node_that_is_lost_while_a_host_starts_there_is_an_error_and_gives_its_place_back() -> None:
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        launcher.start(sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "spot"})))
        await until(lambda: cluster.running)
        host, node_id = next(iter(cluster.running.values()))
        cluster.lose_node(node_id)
        host.end()
        event = await take(launcher, LauncherError)
        assert isinstance(event, LauncherError)
        assert (event.name, event.error) == ("chat-1", "its node is gone")
        await until(lambda: not cluster._reserved)
        await started(launcher, sleeper("chat-1", NodeNeeds({"CPU": 1.0})))


@pytest.mark.slow
async def test_a_node_that_is_lost_while_its_process_takes_leave_ends_it_at_once() -> None:
    cluster = make_cluster(HERE, THERE)
    stubborn = [PYTHON_PLACEHOLDER, "-S", "-c", STUBBORN]
    async with launched(cluster) as launcher:
        spec = sleeper("chat-1", NodeNeeds({"CPU": 1.0}, {"kind": "spot"}), argv=stubborn)
        pid = await started(launcher, spec)
        host, node_id = next(iter(cluster.running.values()))
        cluster.drain_node(node_id, 4e9)
        launcher.stop("chat-1", 60.0)
        cluster.lose_node(node_id)
        host.end()
        event = await take(launcher, ProcessEnded)
        assert isinstance(event, ProcessEnded)
        assert (event.process.exit_code, event.process.last_output) == (None, "its node is gone")
        await until(lambda: not psutil.pid_exists(pid))


@pytest.mark.slow
def test_a_process_whose_heartbeat_stops_is_killed_and_started_again() -> None:
    host = Host("demo", "controller", "here", "10.0.0.1")
    argv = [PYTHON_PLACEHOLDER, "-S", "-c", BEATING, f"{RUN_DIR_PLACEHOLDER}/beat"]
    spec = ProcessSpec("controller", argv, files={"beat": ""}, is_restarted=True, heartbeat_file="beat")
    try:
        first_report = msgspec.msgpack.decode(host.describe(), type=HostReport)
        host.obey(msgspec.msgpack.encode(StartProcess(spec)))
        first = next_host_event(host, 0)
        assert isinstance(first, ProcessStarted)
        beats, deadline_s = Path(first_report.run_dir) / "beat", time.monotonic() + LIMIT_S
        begun_ns = beats.stat().st_mtime_ns
        while beats.stat().st_mtime_ns == begun_ns:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        os.kill(first.process.pid, signal.SIGSTOP)
        ended = next_host_event(host, 1)
        assert isinstance(ended, ProcessEnded)
        assert (ended.process.pid, ended.process.exit_code) == (first.process.pid, -9)
        again = next_host_event(host, 2)
        assert isinstance(again, ProcessStarted)
        assert again.process.pid != first.process.pid
    finally:
        host.end()


def next_host_event(host: Host, after: int) -> HostEvent:
    events = msgspec.msgpack.decode(host.poll(after, LIMIT_S), type=HostEvents).events
    assert events, f"nothing after event {after}"
    return events[0]


def replica_of_three(name: str, tmp_path: Path) -> ProcessSpec:
    """A process with two companions, each of which says its pid."""
    program = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); {}"

    def says(number: int) -> ProcessSpec:
        argv = [
            PYTHON_PLACEHOLDER,
            "-S",
            "-c",
            program.format("time.sleep(600)"),
            str(tmp_path / f"{number}"),
        ]
        return ProcessSpec(f"{name}-rank-{number}", argv, is_restarted=True)

    return sleeper(name, NodeNeeds({"CPU": 2.0}), companions=[says(1), says(2)])


async def pids_in(tmp_path: Path) -> list[int]:
    """Of the two companions, once both have said them."""
    paths = [tmp_path / "1", tmp_path / "2"]
    await until(lambda: all(path.exists() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


@pytest.mark.slow
async def test_companions_have_hosts_of_their_own_in_one_place_and_end_with_it(tmp_path: Path) -> None:
    cluster = make_cluster(HERE, THERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, replica_of_three("chat-1", tmp_path))
        pids = await pids_in(tmp_path)
        assert len(cluster.running) == 3
        assert len({node for _, node in cluster.running.values()}) == 1
        assert len(await cluster.hosts()) == 1
        keepers = {each.parent() for each in map(psutil.Process, [pid, *pids])}
        assert len(keepers) == 3
        launcher.list_processes()
        event = await take(launcher, Processes)
        assert isinstance(event, Processes)
        assert [process.name for process in event.processes] == ["chat-1"]
        launcher.stop("chat-1", 5.0)
        ended = await take(launcher, ProcessEnded)
        assert isinstance(ended, ProcessEnded)
        assert ended.process.exit_code == -15
        await until(lambda: not any(map(psutil.pid_exists, pids)) and not cluster.running)


@pytest.mark.slow
async def test_a_companion_that_ends_is_started_again_and_one_whose_host_is_lost_ends_all(
    tmp_path: Path,
) -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, replica_of_three("chat-1", tmp_path))
        first, second = await pids_in(tmp_path)
        (tmp_path / "1").unlink()
        psutil.Process(first).kill()
        assert (await pids_in(tmp_path))[0] != first
        keeper = psutil.Process(second).parent()
        assert keeper is not None
        keeper.kill()
        ended = await take(launcher, ProcessEnded)
        assert isinstance(ended, ProcessEnded)
        assert (ended.process.name, ended.process.pid, ended.process.exit_code) == ("chat-1", pid, -15)
        assert "the host of rank 2 is lost" in ended.process.last_output
        assert "its keeper ended with -9" in ended.process.last_output
        await until(lambda: not psutil.pid_exists(second) and not cluster.running)


@pytest.mark.slow
async def test_a_later_controller_watches_the_companions_that_it_finds(tmp_path: Path) -> None:
    cluster = make_cluster(HERE)
    async with launched(cluster) as first:
        pid = await started(first, replica_of_three("chat-1", tmp_path))
        pids = await pids_in(tmp_path)
        first.close()
        second = await RayLauncher.connect(cluster, SystemClock(), b"")
        assert psutil.pid_exists(pid)
        key = next(key for key in cluster.running if key.endswith("/3/1"))
        host, _ = cluster.running.pop(key)
        host.end()
        ended = await take(second, ProcessEnded)
        while not (isinstance(ended, ProcessEnded) and ended.process.name == "chat-1"):
            ended = await take(second, ProcessEnded)
        assert "the host of rank 1 is lost: " in ended.process.last_output
        await until(lambda: not any(map(psutil.pid_exists, [pid, *pids])))
        second.close()


async def wait_said(launcher: RayLauncher, *parts: str) -> None:
    """Let everything go until somebody says that a process waits for something with these words in it."""
    said = ""
    while not all(part in said for part in parts):
        event = await take(launcher, ProcessWaiting)
        assert isinstance(event, ProcessWaiting)
        said = event.reason


@pytest.mark.slow
async def test_a_companions_host_that_was_cut_off_and_is_back_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shorten(monkeypatch, silent_after_s=0.1, lost_after_s=1.0, poll_s=0.05)
    can_reach = False

    async def reach(_self: RayLauncher, _address: str) -> bool:
        return can_reach

    monkeypatch.setattr(RayLauncher, "_can_reach", reach)
    cluster = make_cluster(HERE)
    async with launched(cluster) as launcher:
        pid = await started(launcher, replica_of_three("chat-1", tmp_path))
        pids = await pids_in(tmp_path)
        key = next(key for key in cluster.running if key.endswith("/3/2"))
        cluster.silent.add(key)
        await wait_said(launcher, "the host of rank 2 on node here has not answered for 0.")
        (link,) = launcher._links.values()
        assert (link.silent_nodes(), link.is_silent) == ({"here"}, False)
        can_reach = True
        await wait_said(launcher, "the host of rank 2", "answered for 1.3 s")
        cluster.silent.clear()
        await until(lambda: not link.silent_nodes())
        assert all(map(psutil.pid_exists, [pid, *pids]))
        cluster.silent.add(key)
        ended = await take(launcher, ProcessEnded)
        assert isinstance(ended, ProcessEnded)
        assert "the host of rank 2 is lost: it has not answered for 1 s" in ended.process.last_output
        await until(lambda: not any(map(psutil.pid_exists, pids)) and not cluster.running)


@pytest.mark.slow
async def test_a_companion_whose_host_was_silent_when_it_was_told_to_start_is_started_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shorten(monkeypatch, silent_after_s=0.1, lost_after_s=5.0, poll_s=0.05)
    cluster = ForgetfulCluster(lambda group, node, _: Host("demo", group, node.node_id, node.address), [HERE])
    async with launched(cluster) as launcher:
        pid = await started(launcher, replica_of_three("chat-1", tmp_path))
        pids = await pids_in(tmp_path)
        await until(lambda: sorted(cluster.polled.values()) == [2, 2])  # a start, and that it runs already
        assert sorted(cluster.num_obeyed.values()) == [2, 2]
        assert all(map(psutil.pid_exists, [pid, *pids]))


class ForgetfulCluster(FakeCluster):
    """The first answer of each further host to a command is lost, though it has obeyed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.num_obeyed: Counter[str] = Counter()
        self.polled: dict[str, int] = {}
        """How many events each further host was asked behind last."""

    async def call(self, key: str, method: str, *arguments: object, limit_s: float) -> bytes:
        is_further = "/3/" in key
        if method == "poll" and is_further:
            self.polled[key] = cast(int, arguments[0])
        answer = await super().call(key, method, *arguments, limit_s=limit_s)
        if method == "obey" and is_further:
            self.num_obeyed[key] += 1
            if self.num_obeyed[key] == 1:
                raise HostSilent("its answer was lost")
        return answer
