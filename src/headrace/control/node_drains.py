"""Nodes of the cluster that are drained: by when they go, how long their replicas may wait for others. Pure.

A drain is a notice that the cluster has, not the machine. Owns its times on the controller's clock. Must not
know what is on a node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.api.messages import NodeState
from headrace.control.notices import MAX_NOTICE_S

NO_DEADLINE_S = 600.0
"""A drain without a deadline counts as one with this much time."""
LEAVING_MARGIN_S = 7.0
"""What a replica needs beside its drain grace: routers let go of it within 5 s, and it reports its end."""
_PATIENCE_RATIO = 1 / 3
"""Of a short time the first third is for replacements to get ready, the rest for open streams to end."""


@dataclass(frozen=True, slots=True)
class _Drain:
    since_s: float
    leave_by_s: float
    told_s: float
    """The deadline as the cluster tells it."""


class NodeDrains:
    """The nodes that are drained now. `note` hears all nodes, whenever something about them changed."""

    def __init__(self) -> None:
        self._drains: dict[str, _Drain] = {}

    def __repr__(self) -> str:
        return f"NodeDrains({', '.join(self._drains) or 'none'})"

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._drains

    def note(self, nodes: Iterable[NodeState], now_s: float, wall_s: float) -> None:
        """Take what the cluster says of its nodes. wall_s: now_s in seconds since 1970."""
        drains: dict[str, _Drain] = {}
        for node in nodes:
            if not (node.is_alive and node.is_draining):
                continue
            known = self._drains.get(node.node_id)
            if known is None or known.told_s != node.drain_deadline_s:
                left_s = node.drain_deadline_s - wall_s if node.drain_deadline_s > 0 else NO_DEADLINE_S
                left_s = min(max(left_s, 0.0), MAX_NOTICE_S) if math.isfinite(left_s) else NO_DEADLINE_S
                since_s = known.since_s if known is not None else now_s
                known = _Drain(since_s, now_s + left_s, node.drain_deadline_s)
            drains[node.node_id] = known
        self._drains = drains

    def leave_by_s(self, node_id: str) -> float:
        """Return when a drained node goes, on the controller's clock; infinite: it is not drained."""
        drain = self._drains.get(node_id)
        return drain.leave_by_s if drain is not None else math.inf

    def patience_ends_s(self, node_id: str, drain_grace_s: float) -> float:
        """Return how long a replica that nobody has replaced yet may go on serving; infinite: for ever.

        Its streams get their whole grace if there is time for it, and two thirds of the time if not.
        """
        drain = self._drains.get(node_id)
        if drain is None:
            return math.inf
        soon_s = drain.since_s + max(0.0, drain.leave_by_s - drain.since_s) * _PATIENCE_RATIO
        return max(soon_s, drain.leave_by_s - drain_grace_s - LEAVING_MARGIN_S)

    def describe(self, node_id: str, now_s: float) -> str:
        """Say for people that a node is drained, and until when; empty: it is not."""
        drain = self._drains.get(node_id)
        if drain is None:
            return ""
        if drain.told_s <= 0:
            return "draining, by Ray, without a deadline"
        left_s = drain.leave_by_s - now_s
        if left_s <= 0:
            return f"draining, by Ray, for {-left_s:.0f} s past its deadline"
        return f"draining for {left_s:.0f} s more, by Ray"
