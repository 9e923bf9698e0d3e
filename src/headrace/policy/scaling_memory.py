"""A count that follows what is needed: up at once, down only when that pays, and never to and fro. Pure.

Owns the needs of the last minutes. Must not know what they are made from.
"""

from __future__ import annotations

import math

from headrace.policy.autoscaling import MAX_COUNT, Need, ScalingLimits
from headrace.policy.scaling_recent import Largest

DOWN_MARGIN = 1.05
"""A lower count must suffice with so much to spare: a need that trembles at a whole number moves nothing."""
_EPSILON = 1e-6
MAX_CAUTION = 2.0
"""Most that a count which went down too early may lengthen the time that the next one takes."""
REGRET_WINDOWS = 2.0
"""Needing again within so many windows what was given up means that it was given up too early. Windows are
counted without caution."""
CALM_WINDOWS = 10.0
"""Without regret for so many windows, caution halves."""


class CountKeeper:
    """The count of one endpoint over time. `now_s` never goes back (the caller's clock sees to it)."""

    def __init__(self) -> None:
        self.count: int | None = None
        self.caution = 1.0
        self._needs = Largest()
        self._hurried = Largest()
        """What was held for too long asks for replicas: once it is gone, they are kept for a start only."""
        self._seen_since_s = 0.0
        self._down_s = -math.inf
        self._calm_since_s = 0.0

    def __repr__(self) -> str:
        return f"<CountKeeper {self.count}, caution {self.caution:g}>"

    def begin(self, count: int, now_s: float) -> None:
        """Start from the replicas that there are: a controller that restarts takes none away."""
        self.count = count
        self._seen_since_s = self._calm_since_s = now_s

    def forget(self) -> None:
        """The user moved a bound: what is needed now decides, whatever was needed before."""
        self._needs.clear()
        self._hurried.clear()
        self._seen_since_s = -math.inf

    def window_s(self, limits: ScalingLimits, start_s: float) -> float:
        """Return for how long a lower count must have sufficed: at least as long as a start takes, after
        which keeping a replica has cost as much as starting one anew (the ski rental's break-even)."""
        return max(limits.down_after_s, start_s) * self.caution

    def most_needed(self) -> float:
        """Return the largest need of the last window."""
        return max(self._needs.value, self._hurried.value)

    def follow(
        self, need: Need, limits: ScalingLimits, start_s: float, now_s: float, *, may_fall: bool
    ) -> int:
        """Take what is needed now and return the count. `may_fall` is False while not all gateways are heard:
        what is not known is no reason to take away."""
        assert self.count is not None
        if need.is_learned:
            self.caution = 1.0
        window_s = self.window_s(limits, start_s)
        own_window_s = window_s / self.caution
        self._needs.add(min(need.count, limits.max_count), now_s, window_s)
        self._hurried.add(min(need.hurried, limits.max_count), now_s, min(start_s, window_s))
        wanted = self._bounded(max(need.count, need.hurried), limits, need.floor)
        if wanted > self.count:
            self._rise(wanted, now_s, own_window_s)
        elif may_fall:
            self._fall(need, limits, now_s, window_s)
        # A bound that the user moved counts at once, whatever is needed.
        self.count = min(limits.max_count, max(limits.min_count, self.count))
        if self.caution > 1 and now_s - self._calm_since_s > CALM_WINDOWS * own_window_s:
            self.caution, self._calm_since_s = max(1.0, self.caution / 2), now_s
        return self.count

    def _rise(self, wanted: int, now_s: float, window_s: float) -> None:
        if now_s - self._down_s < REGRET_WINDOWS * window_s:
            self.caution, self._calm_since_s = min(MAX_CAUTION, 2 * self.caution), now_s
        self._down_s = -math.inf
        self.count = wanted

    def _fall(self, need: Need, limits: ScalingLimits, now_s: float, window_s: float) -> None:
        assert self.count is not None
        if need.floor == 0 and need.count <= 0 and need.hurried <= 0:  # idle for as long as the user said
            self.count = 0
            return
        if now_s - self._seen_since_s < window_s:
            return
        margin = 1.0 if need.is_learned else DOWN_MARGIN
        sufficed = self._bounded(self.most_needed() * margin, limits, need.floor)
        if sufficed < self.count:
            self.count, self._down_s = sufficed, now_s

    def _bounded(self, need: float, limits: ScalingLimits, floor: int) -> int:
        count = math.ceil(min(need, float(MAX_COUNT)) - _EPSILON)
        return min(limits.max_count, max(limits.min_count, floor, count))
