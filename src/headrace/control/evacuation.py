"""Who leaves a node that is drained, and when: replacements first, as far as there is time. Pure.

Owns the order of leaving. The reconciler starts the replacements, since what is evacuated is nothing that it
counts on. Must not know how a replica leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.control.node_drains import NodeDrains
from headrace.control.reconciler import DesiredEndpoint, LeaveReplica, StopReplica, stop_grace_s
from headrace.control.slots import ObservedReplica, is_evacuated, phase_of


def evacuate(
    desired: Sequence[DesiredEndpoint],
    observed: Sequence[ObservedReplica],
    drains: NodeDrains,
    now_s: float,
) -> list[LeaveReplica | StopReplica]:
    """Return what leaves drained nodes now. Those that nobody has told yet only."""
    actions: list[LeaveReplica | StopReplica] = []
    for endpoint in desired:
        replicas = [replica for replica in observed if replica.endpoint == endpoint.name]
        actions += _evacuate_endpoint(endpoint, replicas, drains, now_s)
    return actions


def _evacuate_endpoint(
    desired: DesiredEndpoint, replicas: Sequence[ObservedReplica], drains: NodeDrains, now_s: float
) -> list[LeaveReplica | StopReplica]:
    actions: list[LeaveReplica | StopReplica] = []
    num_serving = sum(_serves(replica, now_s) and not replica.is_told_to_leave for replica in replicas)
    leaving = [r for r in replicas if is_evacuated(r, now_s) and not r.is_told_to_leave]
    for replica in sorted(leaving, key=lambda r: (drains.leave_by_s(r.node), r.num_open, r.replica_id)):
        phase = phase_of(replica, now_s)
        if phase != "ready":
            grace_s = stop_grace_s(replica, phase)
            reason = f"it is {phase}, and its node goes away"
            actions.append(StopReplica(replica.replica_id, desired.name, grace_s, reason))
            continue
        reason = _why_now(desired, replica, num_serving, drains, now_s)
        if reason:
            num_serving -= _serves(replica, now_s)
            actions.append(LeaveReplica(replica.replica_id, desired.name, reason))
    return actions


def _why_now(
    desired: DesiredEndpoint, replica: ObservedReplica, num_serving: int, drains: NodeDrains, now_s: float
) -> str:
    """Why it leaves now; empty: it waits until others are ready."""
    if not _serves(replica, now_s):
        return "its node goes away, and its last load report is too old"
    if num_serving > desired.count:
        return f"its node goes away, and {num_serving - 1} others serve where {desired.count} are wanted"
    if desired.surge == 0:
        return "its node goes away, and without surge another one starts only then"
    if now_s >= drains.patience_ends_s(replica.node, replica.drain_grace_s):
        return "its node goes away, and its streams need the time that is left"
    return ""


def _serves(replica: ObservedReplica, now_s: float) -> bool:
    return phase_of(replica, now_s) == "ready" and now_s <= replica.lease_ends_s
