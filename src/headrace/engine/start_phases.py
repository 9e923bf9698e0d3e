"""The phases of an engine's start, and of its waking: told as they begin, and measured.

Must not know what happens in a phase, nor who is told.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from headrace.clock import Clock

_STARTED_FIELD = 19
"""Of /proc/PID/stat, counted behind the name: when the process began, in ticks since the machine did."""


class StartPhases:
    """Measures what is between two `begin`s. Phases of one name add up."""

    def __init__(self, on_begin: Callable[[str, float], None], clock: Clock, age_s: float) -> None:
        """`on_begin` hears each phase and the seconds before it. `age_s`: how old the process is already."""
        self._on_begin: Callable[[str, float], None] | None = on_begin
        self._clock = clock
        self._phase_start_s = clock.now_s()
        self._start_s = self._phase_start_s - age_s
        self._phase = ""
        self._seconds = {"starting python": age_s}

    def begin(self, phase: str) -> None:
        """End the running phase and begin `phase`. Raises what `on_begin` raises."""
        now_s = self._end_phase()
        self._phase = phase
        if self._on_begin is not None:
            self._on_begin(phase, now_s - self._start_s)

    def finish(self) -> dict[str, float]:
        """End the last phase; return seconds per phase since the last `finish`. Nobody is told of later
        phases: the engine is ready, and stays so."""
        self._end_phase()
        self._phase, self._on_begin = "", None
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _end_phase(self) -> float:
        now_s = self._clock.now_s()
        if self._phase:
            spent_s = now_s - self._phase_start_s
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent_s
        self._phase_start_s = now_s
        return now_s


def describe_phases(seconds: dict[str, float]) -> str:
    """Return a line for the log: the sum, and each phase's part."""
    parts = ", ".join(f"{phase} {spent_s:.3f}" for phase, spent_s in seconds.items())
    return f"{sum(seconds.values()):.3f} s ({parts})"


def process_age_s() -> float:
    """Seconds since this process was started, to 10 ms; 0 where the system does not say."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_STARTED_FIELD]) / os.sysconf(
            "SC_CLK_TCK"
        )
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, age_s)
