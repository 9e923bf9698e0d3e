"""How much room demand needs to grow in, learned: fleets that exist in numbers alone try rules. Pure.

Each shadow follows the measured demand by a rule of its own, starts replicas as slowly as real ones do, and
serves the same work first come, first served. The cheapest rule that keeps the SLO often enough is taken.
Owns the shadows and what they cost and kept. Must not know real replicas.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from headrace.policy.scaling_recent import Largest

MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""What rules add to the demand of now."""
HOLDS = (1, 4, 16, 64)
"""For how long rules keep what was needed, in windows."""
MEMORY_S = 86_400.0
"""What was longer ago counts less than a third. A day: most demand repeats with it."""
MATURE_WINDOWS = 10
"""Watched for less, shadows may ask for more than the fixed rule, never for less."""
PRIOR_S = 3600.0
"""Watched for less, what is missing counts as in time: one step of demand does not teach a young fleet that
steps are usual."""
MAX_SAMPLES = 4096
"""Most samples whose work may still be in time. More wait only where samples are far shorter than seconds."""
_EPSILON = 1e-6
_MAX_WEIGHT = 1e9


@dataclass(frozen=True, slots=True)
class Terms:
    """What the shadows are to live with, as real replicas do."""

    window_s: float
    """A count that is too large is kept for so long at least."""
    start_s: float
    """What a start usually takes."""
    slack_s: float
    """Work that waited longer is late."""
    min_count: int
    max_count: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What arrived in the `step_s` that end now."""

    work_s: float
    """Seconds of full replicas."""
    num_requests: float
    level: float
    """The demand of now, in full replicas."""
    step_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The cheapest rule that would have kept the SLO often enough; if none did, the one that came closest."""

    margin: float
    hold_s: float
    """For how long it keeps what was needed."""
    base: float
    """Demand that it counts with now, without the margin; what the last window saw is not in it."""
    late_ratio: float
    """Part of the requests that it served too late while another rule served them in time."""
    cost_ratio: float
    """Replicas that it paid for, over those that the work alone would have kept busy."""
    watched_s: float
    sample_s: float
    """Waits that are shorter were not seen."""
    is_mature: bool
    """Watched for long enough to be believed when it asks for less."""

    @property
    def count(self) -> float:
        """Replicas that it asks for, not rounded."""
        return (1 + self.margin) * self.base


class ShadowFleets:
    """All rules of one endpoint. `now_s` never goes back."""

    def __init__(self) -> None:
        self._rules = [_Hold(windows) for windows in HOLDS]
        self._unjudged: deque[tuple[float, float, float]] = deque(maxlen=MAX_SAMPLES)
        """Of each sample: when its work must be served, the work that arrived before its middle, requests."""
        self._arrived_s = 0.0
        self._weight = 1.0
        """Of what is counted now. It grows, instead of all sums shrinking."""
        self._num_judged = 0.0
        self._work_s = 0.0
        self._watched_s = 0.0
        self._sample_s = 0.0

    def __repr__(self) -> str:
        return f"<ShadowFleets {len(HOLDS)}x{len(MARGINS)}, watched {self._watched_s:.0f} s>"

    def observe(self, sample: Sample, terms: Terms, now_s: float) -> None:
        """Take what arrived: each shadow serves, asks for replicas, and is judged."""
        self._grow_weight(sample.step_s)
        due_s = now_s - sample.step_s / 2 + terms.slack_s
        self._unjudged.append((due_s, self._arrived_s + sample.work_s / 2, sample.num_requests))
        self._arrived_s += sample.work_s
        self._work_s += sample.work_s * self._weight
        self._watched_s += sample.step_s
        self._sample_s = sample.step_s
        for hold in self._rules:
            hold.serve(sample, terms, now_s, self._weight)
        while self._unjudged and self._unjudged[0][0] <= now_s:
            _, before_s, num_requests = self._unjudged.popleft()
            self._judge(self._arrived_s - before_s, num_requests)

    def choose(self, attainment_ratio: float, terms: Terms) -> Choice | None:
        """Return the rule to follow; None while nothing was judged."""
        if self._num_judged <= 0:
            return None
        allowed = (1 - attainment_ratio) * self._num_judged * max(1.0, PRIOR_S / self._watched_s)
        _, _, hold, index = min(
            (max(0.0, hold.late[index] - allowed), hold.cost_s[index], hold, index)
            for hold in self._rules
            for index in range(len(MARGINS))
        )
        return Choice(
            margin=MARGINS[index],
            hold_s=hold.num_windows * terms.window_s,
            base=hold.before.value,
            late_ratio=hold.late[index] / self._num_judged,
            cost_ratio=hold.cost_s[index] / max(_EPSILON, self._work_s),
            watched_s=self._watched_s,
            sample_s=self._sample_s,
            is_mature=self._watched_s >= MATURE_WINDOWS * terms.window_s,
        )

    def _judge(self, limit_s: float, num_requests: float) -> None:
        """Count requests as late for each shadow with more work undone than arrived after them, unless they
        are late for all: that no rule could help says nothing of the rules."""
        weighted = num_requests * self._weight
        if all(backlog_s > limit_s for hold in self._rules for backlog_s in hold.backlog_s):
            self._num_judged += weighted
            return
        self._num_judged += weighted
        for hold in self._rules:
            for index, backlog_s in enumerate(hold.backlog_s):
                if backlog_s > limit_s:
                    hold.late[index] += weighted

    def _grow_weight(self, step_s: float) -> None:
        self._weight *= math.exp(step_s / MEMORY_S)
        if self._weight > _MAX_WEIGHT:
            for hold in self._rules:
                hold.rescale(1 / self._weight)
            self._num_judged /= self._weight
            self._work_s /= self._weight
            self._weight = 1.0


class _Hold:
    """The rules that keep what was needed for equally long; they differ in their margins."""

    def __init__(self, num_windows: int) -> None:
        self.num_windows = num_windows
        self.before = Largest()
        """Demand of the hold without its last window: real counts are kept for that one anyway."""
        self.backlog_s = [0.0] * len(MARGINS)
        self.late = [0.0] * len(MARGINS)
        self.cost_s = [0.0] * len(MARGINS)
        self._wanted = Largest()
        self._unready = Largest()
        """Of the negated wants: a replica serves once it was wanted during a whole start."""
        self._counted = (-1.0, -1.0, 0, 0)
        self._counts: list[tuple[int, int]] = []
        """By margin: replicas that are paid for, and that serve, while demand is `_counted`."""

    def __lt__(self, other: _Hold) -> bool:
        return self.num_windows < other.num_windows

    def serve(self, sample: Sample, terms: Terms, now_s: float, weight: float) -> None:
        """Ask for replicas, and serve with those that are ready."""
        step_s = sample.step_s
        self.before.add(sample.level, now_s, (self.num_windows - 1) * terms.window_s)
        wanted = self._wanted.add(sample.level, now_s, self.num_windows * terms.window_s)
        ready = -self._unready.add(-wanted, now_s, terms.start_s + step_s)
        counted = (wanted, ready, terms.min_count, terms.max_count)
        if counted != self._counted:
            self._counted = counted
            self._counts = list(zip(_counts(wanted, terms), _counts(ready, terms), strict=True))
        backlogs, costs_s, paid_s, work_s = self.backlog_s, self.cost_s, step_s * weight, sample.work_s
        for index, (num_paid, num_serving) in enumerate(self._counts):
            costs_s[index] += num_paid * paid_s
            left_s = backlogs[index] + work_s - num_serving * step_s
            backlogs[index] = left_s if left_s > 0 else 0.0

    def rescale(self, factor: float) -> None:
        """Multiply all sums."""
        self.late = [value * factor for value in self.late]
        self.cost_s = [value * factor for value in self.cost_s]


def _counts(demand: float, terms: Terms) -> list[int]:
    """Return the replicas that each margin makes of a demand."""
    lowest, highest = max(1, terms.min_count), terms.max_count
    counts = (math.ceil(demand * (1 + margin) - _EPSILON) for margin in MARGINS)
    return [min(highest, max(lowest, count)) for count in counts]
