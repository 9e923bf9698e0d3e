"""What no policy can beat, or no simple one: fleets that know the whole trace and still wait for starts.

Owns two bounds. *Foreseen*: knows all that comes, and pays for starts. *Best lagging*: the demand of the last
seconds with a constant margin, where window and margin are the cheapest of this very trace.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.autoscaling.fluid import Outcome, World, attainment
from benchmarks.autoscaling.traces import Floats
from headrace.policy.scaling_recent import Largest

MEDIAN_START = 0.8
"""Of starts, in their p95 (`fluid.simulate`)."""
WINDOWS_S = (5, 15, 30, 60, 120)
SPREADS_S = (2, 5, 15, 30, 60, 120)
LEVEL = 0.99
_HALVINGS = 9


def foreseen(world: World) -> Outcome | None:
    """Return the cheapest fleet that follows the mean of what comes, before and after, by a margin."""
    return _cheapest(world, "foreseen", SPREADS_S, lag_s=0)


def best_lagging(world: World) -> Outcome | None:
    """Return the cheapest fleet that follows the mean of what came, a start ago, by a margin."""
    return _cheapest(world, "best lagging", WINDOWS_S, lag_s=1 + round(MEDIAN_START * world.kind.start_s))


def _cheapest(world: World, name: str, windows_s: tuple[int, ...], lag_s: int) -> Outcome | None:
    work, found = world.work(), []
    start_s = MEDIAN_START * world.kind.start_s
    for window_s in windows_s:
        level = _lagging(work, window_s, lag_s) if lag_s else _centred(work, window_s)
        margin, counts = _least_margin(world, work, level, round(start_s))
        reached = attainment(world, work, counts)
        if reached >= LEVEL:
            hours = _hours_with_starts(counts, start_s)
            setting = f"mean of {window_s} s, {margin:.1%} more"
            changes = int(np.count_nonzero(np.diff(counts)))
            found.append(Outcome(name, setting, hours, reached, changes, float(counts.mean())))
    return min(found, key=lambda outcome: outcome.replica_hours, default=None)


def _least_margin(world: World, work: Floats, level: Floats, hold_s: int) -> tuple[float, Floats]:
    """Return the least margin that reaches the level, within (-20%, 1,500%), and the counts."""
    low, high = -0.2, 15.0
    for _ in range(_HALVINGS):
        middle = (1 + low) * ((1 + high) / (1 + low)) ** 0.5 - 1
        if attainment(world, work, _counts(level, middle, hold_s)) >= LEVEL:
            high = middle
        else:
            low = middle
    return high, _counts(level, high, hold_s)


def _counts(level: Floats, margin: float, hold_s: int) -> Floats:
    """Return replicas by second, each kept for as long as it was dearer to start it again."""
    largest, wanted = Largest(), np.maximum(1.0, np.ceil(level * (1 + margin) - 1e-9)).tolist()
    return np.array([largest.add(count, second, hold_s) for second, count in enumerate(wanted)])


def _centred(work: Floats, window_s: int) -> Floats:
    return _mean(work, np.arange(len(work)) - window_s // 2, window_s)


def _lagging(work: Floats, window_s: int, lag_s: int) -> Floats:
    return _mean(work, np.arange(len(work)) - lag_s - window_s, window_s)


def _mean(work: Floats, begin: NDArray[np.int64], window_s: int) -> Floats:
    """Return the means from `begin` on; what is outside the trace is cut off."""
    total = np.concatenate([[0.0], np.cumsum(work)])
    first = np.clip(begin, 0, len(work) - 1)
    last = np.minimum(np.maximum(begin + window_s, first + 1), len(work))
    means: Floats = (total[last] - total[first]) / (last - first)
    return means


def _hours_with_starts(counts: Floats, start_s: float) -> float:
    """Return replica-hours: each rise also pays for the starts."""
    rises = np.maximum(0.0, np.diff(counts)).sum()
    return float(counts.sum() + start_s * rises) / 3600
