"""The one place where time comes from. Pure code takes `now_s` as an argument; shells ask a Clock.

Must not know: who asks. A virtual clock lives beside the tests and the simulator.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds on a monotonic scale, the same as whole nanoseconds for what must add up, and seconds
    since 1970 for what people read."""

    def now_s(self) -> float: ...

    def now_ns(self) -> int: ...

    def wall_s(self) -> float: ...


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wall_s(self) -> float:
        return time.time()


class VirtualClock:
    """A clock that moves only when told to: for tests and the simulator."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def now_ns(self) -> int:
        return round(self._now_s * 1e9)

    def wall_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (>= 0)."""
        assert seconds >= 0, f"time cannot go back by {seconds}"
        self._now_s += seconds
