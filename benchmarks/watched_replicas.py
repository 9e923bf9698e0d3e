"""A system's replicas as its status tells them, and waits for what they should be."""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace.api.messages import ReplicaStatus
from headrace.control.serve import System

READY_LIMIT_S = 120.0


def replicas_of(system: System) -> list[ReplicaStatus]:
    """Return the replicas by status."""
    return system.status().replicas


def wait_for(system: System, condition: Callable[[list[ReplicaStatus]], bool]) -> None:
    """Wait until the replicas are as wanted. Raises RuntimeError."""
    end_s = time.monotonic() + READY_LIMIT_S
    while not condition(replicas_of(system)):
        if time.monotonic() > end_s:
            states = [f"{r.replica_id} {r.state} {r.last_error}" for r in replicas_of(system)]
            raise RuntimeError(f"not as wanted after {READY_LIMIT_S:g} s: {states}")
        time.sleep(0.05)
