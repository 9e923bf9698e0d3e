"""What happens to a system on a Ray cluster, one event at a time, and how long each part of it takes.

Owns the events: a replica more, a host or a node lost, a controller killed. Must not know how a report looks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psutil
from tests.cluster.ray_rig import RayNode

from benchmarks.cluster_rig import ClusterSystem
from benchmarks.ray_groups import GroupWatch
from benchmarks.watched_streams import SteadyLoad
from headrace.api.messages import ReplicaStatus
from headrace.control.admin import CommandRefused, NotRunning

LIMIT_S = 60.0
POLL_S = 0.01
_STARTED_FIELD = 19
"""Of /proc/PID/stat, counted behind the name: when the process began, in ticks since the machine did."""
Phases = dict[str, float]
"""Seconds by phase, in the order in which they are passed."""
FoundT = TypeVar("FoundT")


def add_replica(system: ClusterSystem, watch: GroupWatch, load: SteadyLoad, number: int) -> Phases:
    """Ask for `number` replicas where one fewer is, and follow the new one to its first token."""
    known = {replica.replica_id for replica in system.status().replicas}
    began_s = time.monotonic()
    system.resize(number)
    replica = poll(lambda: _ready_one(system, known), "a new replica is ready")
    ready_s = time.monotonic()
    name = replica.replica_id
    group_s = [
        poll(lambda state=state: watch.moment_s(name, state, began_s), f"its place is {state}")  # type: ignore[misc]
        for state in ("asked", "CREATED")
    ]
    process_s = [_started_s(pid) for pid in (_keeper_pid(replica), replica.pid, replica.engine_pid)]
    first_s = poll(lambda: _first_text_s(load, name, began_s), "a stream of it")
    names = ("decision", "placement group", "host actor", "keeper", "front", "engine", "first token")
    return _spans(names, [began_s, *group_s, *process_s, ready_s, first_s])


def have_replicas(system: ClusterSystem, number: int) -> None:
    """Have so many replicas, all ready."""
    system.resize(number)
    system.wait_ready(number)


def lose_host(system: ClusterSystem, replicas: int) -> Phases:
    """Kill a replica's host actor, and wait until there are so many replicas again."""
    victim = _status_replicas(system)[-1]
    actor = psutil.Process(_keeper_pid(victim)).parent()
    assert actor is not None
    began_s = time.monotonic()
    actor.kill()
    return _replaced(system, victim, began_s, replicas)


def lose_node(system: ClusterSystem, node: RayNode, join: Callable[[], RayNode]) -> tuple[Phases, RayNode]:
    """Kill a node and all of Ray's on it, then let another one join and get its replica. Returns the new one.

    system: one of a replica, which has room on such nodes alone.
    """
    [victim] = _status_replicas(system)
    num_nodes = sum(one.is_alive for one in system.status().nodes)
    began_s = time.monotonic()
    node.kill()
    noticed_s = poll(lambda: _gone_s(system, victim), "the lost node's replica is missed")
    poll(lambda: _num_alive(system) == num_nodes - 1 or None, "the lost node is missed")
    joining_s = time.monotonic()
    joined = join()
    listed_s = poll(lambda: time.monotonic() if _num_alive(system) == num_nodes else None, "the node joins")
    replica = poll(lambda: _ready_one(system, set()), "a replica is ready on the new node")
    ready_s = time.monotonic()
    process_s = [_started_s(pid) for pid in (_keeper_pid(replica), replica.pid, replica.engine_pid)]
    names = ("node joins", "host actor", "keeper", "front", "engine")
    spans = _spans(names, [joining_s, listed_s, *process_s, ready_s])
    return {"noticed": noticed_s - began_s, **spans}, joined


def kill_controller(system: ClusterSystem, number: int, *, whole_host: bool) -> Phases:
    """Kill the controller, or its whole host actor; wait for its next answer, and until it carries out what
    it is told: `number` replicas."""
    status = system.status()
    pid = next(process.pid for process in status.processes if process.name == "controller")
    known = {replica.replica_id for replica in status.replicas}
    victim = psutil.Process(pid)
    if whole_host:
        keeper = victim.parent()
        actor = keeper.parent() if keeper is not None else None
        assert actor is not None
        victim = actor
    began_s = time.monotonic()
    victim.kill()
    answers_s = poll(lambda: _answers_s(system, pid), "the next controller answers")
    poll(lambda: _accepts(system, number), "it takes a command")
    commands_s = poll(lambda: _starts_s(system, known, number), "it carries the command out")
    ready_s = poll(lambda: _ready_s(system, number), "it is done")
    names = ("status answers", "commands again", "command done")
    return _spans(names, [began_s, answers_s, commands_s, ready_s])


def poll(find: Callable[[], FoundT | None], what: str) -> FoundT:
    """Poll until something is found, and return it. Raises RuntimeError."""
    end_s = time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        with suppress(NotRunning):
            found = find()
            if found is not None:
                return found
        time.sleep(POLL_S)
    raise RuntimeError(f"not within {LIMIT_S:g} s: {what}")


def _spans(names: tuple[str, ...], moments_s: list[float]) -> Phases:
    """Phases between moments. A moment that is seen before its turn (a poll was late) makes a phase of 0."""
    spans, before_s = {}, moments_s[0]
    for name, at_s in zip(names, moments_s[1:], strict=True):
        spans[name] = max(0.0, at_s - before_s)
        before_s = max(before_s, at_s)
    return spans


def _replaced(system: ClusterSystem, victim: ReplicaStatus, began_s: float, replicas: int) -> Phases:
    noticed_s = poll(lambda: _gone_s(system, victim), "the lost replica is missed")
    ready_s = poll(lambda: _ready_s(system, replicas), "it is replaced")
    return _spans(("noticed", "replaced"), [began_s, noticed_s, ready_s])


def _status_replicas(system: ClusterSystem) -> list[ReplicaStatus]:
    return sorted(system.status().replicas, key=lambda replica: replica.replica_id)


def _gone_s(system: ClusterSystem, victim: ReplicaStatus) -> float | None:
    for replica in system.status().replicas:
        if (replica.replica_id, replica.pid, replica.state) == (victim.replica_id, victim.pid, "ready"):
            return None
    return time.monotonic()


def _ready_one(system: ClusterSystem, known: set[str]) -> ReplicaStatus | None:
    ready = (r for r in system.status().replicas if r.state == "ready" and r.replica_id not in known)
    return next(ready, None)


def _ready_s(system: ClusterSystem, number: int) -> float | None:
    status = system.status()
    is_done = len(status.replicas) == number and all(r.state == "ready" for r in status.replicas)
    return time.monotonic() if is_done else None


def _num_alive(system: ClusterSystem) -> int:
    return sum(node.is_alive for node in system.status().nodes)


def _answers_s(system: ClusterSystem, old_pid: int) -> float | None:
    pids = [process.pid for process in system.status().processes if process.name == "controller"]
    return time.monotonic() if pids and old_pid not in pids else None


def _accepts(system: ClusterSystem, number: int) -> bool | None:
    with suppress(CommandRefused):  # it knows too little yet
        system.resize(number)
        return True
    return None


def _starts_s(system: ClusterSystem, known: set[str], number: int) -> float | None:
    """When a new replica was seen, or one of the known ones was seen to leave."""
    replicas = system.status().replicas
    is_new = any(replica.replica_id not in known for replica in replicas)
    num_staying = sum(replica.state != "draining" for replica in replicas)
    return time.monotonic() if is_new or num_staying == number else None


def _first_text_s(load: SteadyLoad, replica_id: str, after_s: float) -> float | None:
    results = [*load.results[-1000:], *load.open]
    texts = [
        result.first_s
        for result in results
        if result.replica_id == replica_id and result.first_s and result.begin_s > after_s
    ]
    return min(texts, default=None)


def _keeper_pid(replica: ReplicaStatus) -> int:
    keeper = psutil.Process(replica.pid).parent()
    assert keeper is not None
    return keeper.pid


def _started_s(pid: int) -> float:
    """When a process began, on the monotonic clock, to 10 ms."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_STARTED_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s
