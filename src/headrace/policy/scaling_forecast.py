"""What demand will be when a replica that is asked for now is ready. Pure.

Owns the method: the level of now, and a trend that medians confirm, so that no single burst makes one. Never
below what is now. Must not know where the series comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

NUM_PARTS = 12
"""The window that the trend is read from, in parts: four to each third of it."""
WINDOW_HORIZONS = 3.0
"""The window, in horizons."""
MIN_WINDOW_S = 36.0
MAX_WINDOW_S = 1800.0
MAX_GROWTH = 1.0
"""Most that a trend may add, in levels: within one horizon demand at most doubles."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Demand at the end of the horizon, and what it was made from."""

    value: float
    level: float
    trend_per_s: float
    horizon_s: float
    method: str


def window_s(horizon_s: float) -> float:
    """Return how far back the trend looks."""
    return min(MAX_WINDOW_S, max(MIN_WINDOW_S, WINDOW_HORIZONS * horizon_s))


def forecast(parts: Sequence[float], now: float, horizon_s: float) -> Forecast:
    """Return the demand `horizon_s` from now. `parts`: mean demand of the window's NUM_PARTS parts, oldest
    first; fewer: too young for a trend. `now`: the level of now."""
    if len(parts) < NUM_PARTS:
        return Forecast(now, now, 0.0, horizon_s, "level: observed for too short a time for a trend")
    third = NUM_PARTS // 3
    old, middle, new = (median(parts[start : start + third]) for start in range(0, NUM_PARTS, third))
    if not old < middle < new:
        return Forecast(now, now, 0.0, horizon_s, "level: no steady trend")
    seconds = window_s(horizon_s)
    trend = (new - old) / (seconds * 2 / 3)
    # The newest third's median stands for the demand half a third ago.
    expected = new + trend * (horizon_s + seconds / 6)
    value = min(max(now, expected), now * (1 + MAX_GROWTH))
    return Forecast(max(now, value), now, trend, horizon_s, "level and trend of the medians of three thirds")
