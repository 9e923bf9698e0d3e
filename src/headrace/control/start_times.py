"""How long starts of an endpoint's replicas took, and how long one under way still takes by that. Pure.

Owns the memory of earlier starts, bounded. Must not know why a replica is started.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal

StartKind = Literal["cold", "standby"]
"""standby: woken; cold: everything else."""
MAX_REMEMBERED = 64
DEFAULT_S: dict[StartKind, float] = {"standby": 0.3, "cold": 6.0}
"""Before anything was measured: what the engine's own report found for a small model."""
PACKED_S = 3.0
"""A cold start that maps packed weights, before anything was measured."""
LATE_RATIO = 0.2
"""One that takes longer than usual is expected to take this part of its age more."""
MIN_LATE_S = 0.2


class StartTimes:
    """One endpoint's earlier starts, in seconds each, oldest first."""

    def __init__(self) -> None:
        self.seconds: dict[StartKind, deque[float]] = {
            "cold": deque(maxlen=MAX_REMEMBERED),
            "standby": deque(maxlen=MAX_REMEMBERED),
        }

    def __repr__(self) -> str:
        return f"StartTimes({', '.join(f'{len(s)} {kind}' for kind, s in self.seconds.items())})"

    def add(self, kind: StartKind, seconds: float) -> None:
        """Remember a start that succeeded. What cannot be true is ignored."""
        if 0 <= seconds < 86_400:
            self.seconds[kind].append(seconds)

    def expected_s(self, kind: StartKind, default_s: float | None = None) -> float:
        """What a start takes: the median of earlier ones, else `default_s`, else a general default."""
        earlier = self.seconds[kind]
        if earlier:
            return median(earlier)
        return DEFAULT_S[kind] if default_s is None else default_s

    def remaining_s(self, kind: StartKind, elapsed_s: float, default_s: float | None = None) -> float:
        """What a start that began `elapsed_s` ago still takes; never 0, since it is not over."""
        usual_s = self.expected_s(kind, default_s) - elapsed_s
        return max(usual_s, LATE_RATIO * max(elapsed_s, 0.0), MIN_LATE_S)
