"""The reconciler: what is wanted and what is seen, to actions with their reasons. Pure.

Owns counts, victims, replacement and restart back-off. Must not know asyncio, time, sockets or processes:
`now_s` comes in, actions go out, and the same code runs in the simulator.

A replica's id is a slot: a crashed replica keeps its slot through its back-off, so that a crash never makes
the fleet larger. Surge: while replicas are replaced, one more than wanted may run; draining replicas count
towards the endpoint's maximum plus that one, because they still hold memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal

from headrace.api.messages import ReplicaState

FIRST_RESTART_DELAY_S = 0.5
MAX_RESTART_DELAY_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A replica that was ready this long has no crashes behind it."""
MAX_FAST_FAILURES = 5
"""After so many failures in a row the slot counts as failed, and is retried slowly."""
FAILED_RETRY_S = 60.0
LOST_AFTER_S = 10.0
"""A live process whose lease ended this long ago hangs: it is killed and replaced."""
MAX_SURGE = 1
IDLE_TO_ZERO_S = 300.0
"""An endpoint that held requests woke up from zero goes back to zero after this long without any."""

Phase = Literal["pending", "starting", "ready", "draining", "failed", "lost", "standby"]


@dataclass(frozen=True, slots=True)
class DesiredEndpoint:
    """What is wanted of one endpoint."""

    name: str
    count: int
    max_count: int
    generation: str
    """Hash of what its replicas are started with; live replicas of another hash are replaced."""
    reason: str = ""
    """Why the count is what it is."""


@dataclass(frozen=True, slots=True)
class ObservedReplica:
    """One slot as it is seen: its process, its last load report, its crashes."""

    replica_id: str
    endpoint: str
    generation: str
    """What the live process was started with."""
    is_alive: bool
    """The launcher has its process, or was asked to start it."""
    is_stopping: bool
    started_s: float
    lease_ends_s: float
    """Before the first report: when the first report is due."""
    report_state: ReplicaState | None = None
    ready_since_s: float | None = None
    num_open: int = 0
    keeps_slot: bool = False
    """With is_stopping: it is stopped because it failed, and will be started again in its slot."""
    drain_grace_s: float = 30.0
    ended_s: float = 0.0
    failures: int = 0
    """Failures in a row."""
    is_retryable: bool = True
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class StartReplica:
    replica_id: str
    endpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopReplica:
    """grace_s 0 kills at once. `is_failure`: count it as a crash; the slot stays and backs off."""

    replica_id: str
    endpoint: str
    grace_s: float
    reason: str
    is_failure: bool = False


@dataclass(frozen=True, slots=True)
class ForgetReplica:
    """Give up a slot that has no process, or whose process is being stopped: nothing wants it any more."""

    replica_id: str
    endpoint: str
    reason: str


Action = StartReplica | StopReplica | ForgetReplica


def reconcile(
    desired: Sequence[DesiredEndpoint], observed: Sequence[ObservedReplica], now_s: float
) -> list[Action]:
    """Return what to do now. Nothing, when what is seen is what is wanted."""
    by_endpoint: dict[str, list[ObservedReplica]] = {endpoint.name: [] for endpoint in desired}
    actions: list[Action] = []
    for replica in observed:
        if replica.endpoint in by_endpoint:
            by_endpoint[replica.endpoint].append(replica)
        else:
            actions += _remove(replica, phase_of(replica, now_s), "its endpoint was removed")
    for endpoint in desired:
        actions += _Turn(endpoint, by_endpoint[endpoint.name], now_s).run()
    return actions


def phase_of(replica: ObservedReplica, now_s: float) -> Phase:
    """What to call the slot's state, for decisions and for people."""
    if not replica.is_alive:
        return "failed" if is_failed(replica) else "pending"
    if replica.is_stopping:
        return "failed" if replica.keeps_slot else "draining"
    if now_s > replica.lease_ends_s + LOST_AFTER_S:
        return "lost"
    return replica.report_state or "starting"


def is_failed(replica: ObservedReplica) -> bool:
    """Whether starting it again soon is not expected to help."""
    return replica.failures > 0 and (not replica.is_retryable or replica.failures >= MAX_FAST_FAILURES)


def restart_due_s(replica: ObservedReplica) -> float:
    """When a slot without a process may be started."""
    if replica.failures == 0:
        return -math.inf
    if is_failed(replica):
        return replica.ended_s + FAILED_RETRY_S
    return replica.ended_s + restart_delay_s(replica.failures)


def restart_delay_s(failures: int) -> float:
    """Doubling from half a second. `failures` >= 1 counts failures in a row."""
    return float(min(FIRST_RESTART_DELAY_S * 2.0 ** min(failures - 1, 16), MAX_RESTART_DELAY_S))


def count_failures(replica: ObservedReplica, now_s: float) -> int:
    """Failures in a row, this one included: a replica that was healthy for a while begins anew."""
    if replica.ready_since_s is not None and now_s - replica.ready_since_s >= HEALTHY_AFTER_S:
        return 1
    return replica.failures + 1


def choose_count(minimum: int, num_held: int, idle_s: float) -> tuple[int, str]:
    """Return how many replicas an endpoint should have, and why. idle_s: since it last had a request,
    infinite if it never had one."""
    if minimum > 0:
        return minimum, f"replicas.min is {minimum}"
    if num_held > 0:
        return 1, "held requests"
    if idle_s < IDLE_TO_ZERO_S:
        return 1, f"had requests {idle_s:.0f} s ago"
    return 0, "replicas.min is 0 and there are no requests"


def slot_prefix(endpoint: str) -> str:
    """The part of replica ids before the number: safe in file names, and different for every endpoint."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", endpoint)[:40]
    if safe == endpoint:
        return safe
    return f"{safe}-{sha256(endpoint.encode()).hexdigest()[:6]}"


def lowest_free_id(endpoint: str, taken: set[str]) -> str:
    """The first of ENDPOINT-1, ENDPOINT-2, … that is not taken."""
    prefix = slot_prefix(endpoint)
    number = 1
    while f"{prefix}-{number}" in taken:
        number += 1
    return f"{prefix}-{number}"


class _Turn:
    """One endpoint's decisions at one moment."""

    def __init__(self, desired: DesiredEndpoint, replicas: Sequence[ObservedReplica], now_s: float) -> None:
        self.desired = desired
        self.now_s = now_s
        self.phases = {replica.replica_id: phase_of(replica, now_s) for replica in replicas}
        self.taken = set(self.phases)
        self.num_alive = sum(replica.is_alive for replica in replicas)
        # The slots that count. A draining replica has given its slot up already.
        self.slots = [replica for replica in replicas if self._phase(replica) != "draining"]
        self.actions: list[Action] = []

    def run(self) -> list[Action]:
        self._stop_broken()
        self._drop_unready_outdated()
        self._drop_surplus()
        self._fill_up()
        return self.actions

    def _phase(self, replica: ObservedReplica) -> Phase:
        return self.phases[replica.replica_id]

    def _is_outdated(self, replica: ObservedReplica) -> bool:
        is_current = replica.generation == self.desired.generation
        return replica.is_alive and not replica.is_stopping and not is_current

    @property
    def _is_replacing(self) -> bool:
        return self.desired.count > 0 and any(map(self._is_outdated, self.slots))

    def _stop_broken(self) -> None:
        """Hung and failed replicas go at once: they serve nothing. Their slots stay and back off."""
        for index, replica in enumerate(self.slots):
            phase = self._phase(replica)
            if replica.is_stopping or not replica.is_alive or phase not in ("lost", "failed"):
                continue
            if phase == "lost":
                reason = f"no load report for {self.now_s - replica.lease_ends_s:.0f} s after its lease"
            else:
                reason = replica.last_error or "failed without saying why"
            self.slots[index] = replace(replica, is_stopping=True, keeps_slot=True)
            self.phases[replica.replica_id] = "failed"
            stop = StopReplica(replica.replica_id, self.desired.name, 0.0, reason, is_failure=True)
            self.actions.append(stop)

    def _drop_unready_outdated(self) -> None:
        for replica in list(self.slots):
            if self._is_outdated(replica) and self._phase(replica) == "starting":
                self._drop(replica, "the config changed before it was ready")

    def _drop_surplus(self) -> None:
        """More slots than wanted. A replacement may have one more until it is ready."""
        num_ready = sum(self._phase(replica) == "ready" for replica in self.slots)
        is_surge_allowed = self._is_replacing and num_ready <= self.desired.count
        reason = f"{self.desired.count} wanted: {self.desired.reason}"
        if self._is_replacing:
            reason = "the config changed and a new replica is ready"
        surplus = len(self.slots) - self.desired.count - (MAX_SURGE if is_surge_allowed else 0)
        for victim in sorted(self.slots, key=self._victim_order)[: max(surplus, 0)]:
            self._drop(victim, reason)

    def _victim_order(self, replica: ObservedReplica) -> tuple[int, bool, int, float]:
        """Failed first, then pending and starting, then outdated, least open requests, newest."""
        order = {"failed": 0, "pending": 1, "starting": 2}.get(self._phase(replica), 3)
        return order, not self._is_outdated(replica), replica.num_open, -replica.started_s

    def _fill_up(self) -> None:
        """Start slots that are due, then new slots, within the maximum plus the surge."""
        room = max(self.desired.max_count, self.desired.count) + MAX_SURGE - self.num_alive
        name = self.desired.name
        idle = [replica for replica in self.slots if not replica.is_alive]
        for replica in sorted(idle, key=lambda replica: (replica.ended_s, replica.replica_id)):
            if room > 0 and self.now_s >= restart_due_s(replica):
                reason = f"again after {replica.failures} failures" if replica.failures else "not running"
                self.actions.append(StartReplica(replica.replica_id, name, reason))
                room -= 1
        reason = "the config changed" if self._is_replacing else self.desired.reason
        num_wanted = self.desired.count + (MAX_SURGE if self._is_replacing else 0)
        for _ in range(min(num_wanted - len(self.slots), room)):
            replica_id = lowest_free_id(name, self.taken)
            self.taken.add(replica_id)
            self.actions.append(StartReplica(replica_id, name, reason))

    def _drop(self, replica: ObservedReplica, reason: str) -> None:
        self.slots.remove(replica)
        already = [a for a in self.actions if a.replica_id == replica.replica_id]
        for action in already:  # stopped as broken a moment ago: then its slot simply ends too
            self.actions.remove(action)
            replica = replace(replica, is_stopping=False, keeps_slot=False)
        self.actions += _remove(replica, self._phase(replica), reason)


def _remove(replica: ObservedReplica, phase: Phase, reason: str) -> list[Action]:
    """Stop it if it lives, give its slot up if not."""
    if not replica.is_alive or replica.keeps_slot:
        return [ForgetReplica(replica.replica_id, replica.endpoint, reason)]
    if replica.is_stopping:
        return []
    serving, idle = replica.drain_grace_s, 1.0
    graces_s = {"ready": serving, "draining": serving, "starting": idle, "standby": idle}
    grace_s = graces_s.get(phase, 0)
    return [StopReplica(replica.replica_id, replica.endpoint, grace_s, reason)]
