"""How requests of each version ended, over all routers and their restarts. Pure.

Owns the sums of what routers count from their own start on. Must not know what follows from them.
"""

from __future__ import annotations

from collections.abc import Collection

from headrace.api.messages import Demand, VersionDemand
from headrace.policy.rollout import Outcomes

_Key = tuple[str, str]
"""Endpoint, generation."""


class VersionCounts:
    """Outcomes by endpoint and generation since the controller's start, growing only."""

    def __init__(self) -> None:
        self._sums: dict[_Key, Outcomes] = {}
        self._seen: dict[str, tuple[tuple[int, str], dict[_Key, Outcomes]]] = {}
        """By router: its process, and what it counted last."""

    def __repr__(self) -> str:
        return f"VersionCounts({len(self._sums)} versions, {len(self._seen)} routers)"

    def observe(self, demand: Demand) -> None:
        """Take a router's totals. What one that was restarted counts is new."""
        process = demand.pid, demand.node_address
        before, seen = self._seen.get(demand.router_id, (process, {}))
        if before != process:
            seen = {}
        now = {(version.endpoint, version.generation): _outcomes(version) for version in demand.versions}
        for key, outcomes in now.items():
            self._sums[key] = _add(self.of(*key), outcomes.since(seen.get(key, Outcomes())))
        self._seen[demand.router_id] = process, now

    def of(self, endpoint: str, generation: str) -> Outcomes:
        """Return what came of a version's requests."""
        return self._sums.get((endpoint, generation), Outcomes())

    def forget_all_but(self, generations: Collection[_Key]) -> None:
        """Forget versions that nobody asks about any more."""
        self._sums = {key: outcomes for key, outcomes in self._sums.items() if key in generations}


def _outcomes(version: VersionDemand) -> Outcomes:
    return Outcomes(version.finished, version.failed, version.slow_ttft, version.slow_itl)


def _add(one: Outcomes, other: Outcomes) -> Outcomes:
    return Outcomes(
        one.finished + other.finished,
        one.failed + other.failed,
        one.slow_ttft + other.slow_ttft,
        one.slow_itl + other.slow_itl,
    )
