"""One slot as the controller sees it: what its replica's state is called, when it may be started again. Pure.

A replica's id is a slot: a crashed replica keeps its slot through its back-off, so that a crash never makes
the fleet larger. Owns phases, back-off and ids. Must not know what is wanted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
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

Phase = Literal["pending", "starting", "ready", "draining", "failed", "lost", "standby"]
Role = Literal["serving", "standby", "resting"]
"""What a replica is for: to serve; to sleep until it is promoted; resting: a user put it to sleep, and only a
user wakes it."""


@dataclass(frozen=True, slots=True)
class ObservedReplica:
    """One slot as it is seen: its process, its last load report, its crashes."""

    replica_id: str
    endpoint: str
    generation: str
    """What its process was last started with."""
    is_alive: bool
    """The launcher has its process, or was asked to start it."""
    is_stopping: bool
    started_s: float
    lease_ends_s: float
    """Before the first report: when the first report is due."""
    report_state: ReplicaState | None = None
    ready_since_s: float | None = None
    num_open: int = 0
    """Requests and guests in its engine."""
    keeps_slot: bool = False
    """With is_stopping: it is stopped because it failed, and will be started again in its slot."""
    drain_grace_s: float = 30.0
    ended_s: float = 0.0
    failures: int = 0
    """Failures in a row."""
    is_retryable: bool = True
    last_error: str = ""
    role: Role = "serving"
    is_changing: bool = False
    """It was told to sleep or to wake, and has not done it yet. Its role is what it is to become."""
    can_change: bool = True
    """False for a while after it could not sleep or wake."""
    lost_tokens: float = 0.0
    """Tokens that would have to be computed again without it: those of its open requests, and those that
    its prefix cache spared lately."""
    is_leaving: bool = False
    """Its machine is about to go away."""
    node: str = ""
    is_node_draining: bool = False
    """The cluster wants its node empty."""
    is_told_to_leave: bool = False
    """For that reason, by this controller."""
    silent_from_s: float = -math.inf
    """If later than its lease's end, its silence counts from here: the controller itself stood still."""

    def silent_s(self, now_s: float) -> float:
        """How long it could have been heard since its lease ended, and was not; negative before that."""
        return now_s - max(self.lease_ends_s, self.silent_from_s)


def phase_of(replica: ObservedReplica, now_s: float) -> Phase:
    """What to call the slot's state, for decisions and for people."""
    if not replica.is_alive:
        return "failed" if is_failed(replica) else "pending"
    if replica.is_stopping:
        return "failed" if replica.keeps_slot else "draining"
    if replica.silent_s(now_s) > LOST_AFTER_S:
        return "lost"
    return replica.report_state or "starting"


def is_evacuated(replica: ObservedReplica, now_s: float) -> bool:
    """Whether it is to leave with its node, and another one to take its place, though it works."""
    return replica.is_node_draining and phase_of(replica, now_s) in ("starting", "ready", "standby")


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


def slot_prefix(endpoint: str) -> str:
    """The part of replica ids before the number: safe in file names, and different for every endpoint."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", endpoint)[:40]
    if safe == endpoint:
        return safe
    return f"{safe}-{sha256(endpoint.encode()).hexdigest()[:6]}"


def lowest_free_id(prefix: str, taken: set[str]) -> str:
    """The first of PREFIX-1, PREFIX-2, … that is not taken."""
    number = 1
    while f"{prefix}-{number}" in taken:
        number += 1
    return f"{prefix}-{number}"
