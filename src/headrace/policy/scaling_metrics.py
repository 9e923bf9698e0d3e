"""Numbers of the user's own that ask for replicas, and when they are not believed. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_REPLICAS = 1024.0
"""A metric that asks for more is a mistake, or an attack: it is ignored rather than cut."""


@dataclass(frozen=True, slots=True)
class MetricReading:
    """A custom metric as it was last read."""

    name: str
    per_replica: float
    max_age_s: float
    value: float | None = None
    age_s: float = math.inf
    error: str = ""
    """Why the last reading gave nothing."""


def replicas_asked(reading: MetricReading) -> tuple[float | None, str]:
    """Return the replicas that a metric asks for, not rounded, or None; and where that comes from, or why it
    is ignored."""
    value = reading.value
    if value is None:
        return None, f"ignored: {reading.error or 'not read yet'}"
    if math.isnan(value) or math.isinf(value) or value < 0:
        return None, f"ignored: it is {value:g}; it must be a finite number >= 0"
    if not 0 <= reading.age_s <= reading.max_age_s:
        because = f": {reading.error}" if reading.error else ""
        return None, f"ignored: {reading.age_s:.0f} s old, max_age_s is {reading.max_age_s:g}{because}"
    asked = value / reading.per_replica
    if asked > MAX_REPLICAS:
        return (
            None,
            f"ignored: {value:g} would need {asked:.3g} replicas; per_replica is {reading.per_replica:g}",
        )
    return asked, f"{value:g} at {reading.per_replica:g} per replica"
