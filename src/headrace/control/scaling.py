"""How many replicas an endpoint is to have: held requests wake it from zero. Pure.

Must not know slots, versions, or how a count is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

IDLE_TO_ZERO_S = 300.0
"""An endpoint that held requests woke up from zero goes back to zero after this long without any."""


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas, and why."""

    count: int
    """Serving replicas over all versions."""
    standby: int
    reason: str


class EndpointScaler:
    """One endpoint's count."""

    def __init__(self, minimum: int, standby: int) -> None:
        self._minimum = minimum
        self._standby = standby
        self._num_held = 0
        self._idle_s = 0.0

    def observe(self, num_held: int, idle_s: float) -> None:
        """idle_s: since it last had a request, infinite if it never had one."""
        self._num_held, self._idle_s = num_held, idle_s

    def decide(self, now_s: float) -> ScalingDecision:
        """Return how many replicas it is to have now."""
        count, reason = self._choose()
        return ScalingDecision(count, self._standby, reason)

    def _choose(self) -> tuple[int, str]:
        if self._minimum > 0:
            return self._minimum, f"replicas.min is {self._minimum}"
        if self._num_held > 0:
            return 1, "held requests"
        if self._idle_s < IDLE_TO_ZERO_S:
            return 1, f"had requests {self._idle_s:.0f} s ago"
        return 0, "replicas.min is 0 and there are no requests"
