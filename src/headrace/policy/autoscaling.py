"""How many replicas an endpoint needs now, and why: each reason's own number, the largest wins. Pure.

Owns what speaks for replicas: work that comes, open requests, held ones, custom metrics. Must not know how
demand is measured, nor what was decided before (`scaling_memory` keeps counts steady).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.api.messages import ExplainedNumber, Explanation
from headrace.policy.scaling_capacity import Capacity
from headrace.policy.scaling_forecast import Forecast
from headrace.policy.scaling_metrics import MetricReading, replicas_asked
from headrace.policy.scaling_queue import LATE_RATIO, replicas_within

DEFAULT_PATIENCE_S = 1.0
"""Where no TTFT is promised: a request held for longer is a reason to hurry."""
MIN_SLACK_RATIO = 0.1
"""Of the TTFT's SLO, where a prompt alone takes it all."""
MIN_CLEAR_S = 5.0
"""What is held need not be gone sooner than this."""
PANIC_STEP = 2.0
"""Held requests ask for at most so many times the replicas that serve: if those cannot start, or what is held
is not what it seems, the fleet does not run away."""
OVERFULL = 1.25
"""Replicas with so much more open than fills them keep no SLO between tokens."""
MAX_COUNT = 1 << 20


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """What an endpoint's config allows and asks for."""

    min_count: int = 1
    max_count: int = 1
    standby: int = 0
    target_utilization: float = 0.7
    down_after_s: float = 60.0
    idle_to_zero_s: float = 300.0
    ttft_s: float = 0.0
    itl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """The requests that are there now."""

    num_held: int = 0
    oldest_held_s: float = 0.0
    held_work_s: float = 0.0
    """Seconds of full replicas that the held ones need."""
    num_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Supply:
    """The replicas that there are, and how soon there can be more."""

    num_ready: int = 0
    pending_s: tuple[float, ...] = ()
    """Of each that starts: when it will be ready, seconds from now."""
    num_standby: int = 0
    start_s: float = 10.0
    """Measured p95 of start and of promotion."""
    promotion_s: float = 1.0

    def within_s(self) -> float:
        """When one that is asked for now can serve."""
        return self.promotion_s if self.num_standby > 0 else self.start_s


@dataclass(frozen=True, slots=True)
class ScalingInput:
    """Everything that a decision is made from."""

    limits: ScalingLimits
    supply: Supply
    waiting: Waiting
    max_running: float
    """Requests that one replica computes together."""
    idle_s: float
    """Since there was a request, by the gateways' view."""
    demand: float = 0.0
    """Full replicas that the work arriving now keeps busy. 0 while `capacity` is None."""
    capacity: Capacity | None = None
    dispersion_s: float = 0.0
    at_start: Forecast | None = None
    """Demand when a replica that is started now is ready, and, with standby, when one is promoted."""
    at_promotion: Forecast | None = None
    metrics: Sequence[MetricReading] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """So many replicas, not rounded, because of that."""

    count: float
    text: str


@dataclass(frozen=True, slots=True)
class Need:
    """What is needed now, and everything that it was made from."""

    count: float
    """By demand, not rounded, without the floor."""
    reason: str
    floor: int
    """Fewest replicas now, whatever demand is: replicas.min, or one while there are requests."""
    numbers: tuple[ExplainedNumber, ...]


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas shall serve and stand by, over all versions, and why."""

    count: int
    standby: int
    reason: str
    numbers: tuple[ExplainedNumber, ...] = ()
    history: tuple[str, ...] = ()
    """The last changes of the count, newest first, one line each."""

    def explanation(self, endpoint: str) -> Explanation:
        """Return it for people."""
        standby = f" and {self.standby} on standby" if self.standby else ""
        decision = f"{endpoint}: {self.count} replicas{standby}"
        return Explanation(decision, self.reason, list(self.numbers), list(self.history))


def assess(given: ScalingInput) -> Need:
    """Return what is needed now."""
    numbers = _Numbers()
    floor = _floor(given)
    reasons = [*_work(given, numbers), *_open(given, numbers), *_held(given, numbers)]
    if floor.count == 0:
        reasons = []  # the gateways are idle for as long as the user said: rates fade more slowly
    reasons += _metrics(given, numbers)
    most = max(reasons, key=lambda reason: reason.count, default=Reason(0.0, floor.text))
    text = most.text if most.count > floor.count else floor.text
    _describe_supply(given, numbers)
    count = min(max(0.0, most.count), float(MAX_COUNT))
    return Need(count, text, int(floor.count), tuple(numbers.all))


class _Numbers:
    def __init__(self) -> None:
        self.all: list[ExplainedNumber] = []

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.all.append(ExplainedNumber(name, value, unit, note))


def _floor(given: ScalingInput) -> Reason:
    limits, waiting = given.limits, given.waiting
    if limits.min_count > 0:
        return Reason(limits.min_count, f"replicas.min is {limits.min_count}")
    if waiting.num_held > 0:
        return Reason(1, f"{waiting.num_held} held requests")
    if waiting.num_in_flight > 0:
        return Reason(1, f"{waiting.num_in_flight} requests are open")
    if given.idle_s < limits.idle_to_zero_s:
        return Reason(1, f"had requests {given.idle_s:.0f} s ago")
    return Reason(0, "replicas.min is 0 and there are no requests")


def _work(given: ScalingInput, numbers: _Numbers) -> list[Reason]:
    """Replicas for the work that comes until further ones can serve."""
    capacity, limits = given.capacity, given.limits
    if capacity is None or given.at_start is None:
        return []
    numbers.add("demand", given.demand, "replicas", "full ones that the work arriving now keeps busy")
    numbers.add("request_cost", capacity.mean_request_s, "s", "of a full replica, per mean request")
    numbers.add("max_batch", capacity.max_batch, "requests", capacity.bound)
    numbers.add("dispersion", given.dispersion_s, "s", "variance over mean of the arriving work")
    reasons, soon = [], given.at_promotion
    if given.supply.num_standby and soon is not None:
        numbers.add("forecast_promotion", soon.value, "replicas", soon.method)
        reasons.append(_work_reason(_replicas_for(soon.value, given, None), soon, given.demand))
    later = given.at_start
    numbers.add("forecast", later.value, "replicas", f"{later.method}; {later.horizon_s:.3g} s ahead")
    count = _replicas_for(later.value, given, numbers)
    # Those on standby are there sooner: what they can take over need not be started now.
    count -= min(given.supply.num_standby, limits.standby)
    reasons.append(_work_reason(count, later, given.demand))
    return reasons


def _work_reason(count: float, expected: Forecast, demand: float) -> Reason:
    text = f"work for {demand:.2f} full replicas arrives"
    if expected.value > demand * 1.01:
        text += f", {expected.value:.2f} expected in {expected.horizon_s:.3g} s"
    return Reason(count, f"{text}: {count:.2f} keep it within the SLO and the target utilization")


def _replicas_for(demand: float, given: ScalingInput, numbers: _Numbers | None) -> float:
    """Replicas for so much demand: busy to the target at most, and with waits within the SLO."""
    limits, capacity = given.limits, given.capacity
    assert capacity is not None
    by_target = demand / limits.target_utilization
    if numbers is not None:
        numbers.add("target_utilization", limits.target_utilization, "ratio", "scaling.target_utilization")
    if limits.ttft_s <= 0 or demand <= 0:
        return by_target
    slack_s = max(limits.ttft_s - capacity.prefill_s, limits.ttft_s * MIN_SLACK_RATIO)
    by_wait = replicas_within(demand, given.dispersion_s, slack_s)
    if numbers is not None:
        numbers.add(
            "wait_slack", slack_s, "s", f"of slo.ttft, after {capacity.prefill_s:.3g} s for the prompt"
        )
        text = f"most that keeps {LATE_RATIO:.0%} of the waits beyond it"
        numbers.add("slo_utilization", demand / by_wait, "ratio", text)
    return max(by_target, by_wait)


def _open(given: ScalingInput, numbers: _Numbers) -> list[Reason]:
    """Replicas for the requests that are there, however long they stay."""
    waiting = given.waiting
    numbers.add("in_flight", waiting.num_in_flight, "requests")
    if given.capacity is not None:
        count, ready = waiting.num_in_flight / given.capacity.max_batch, given.supply.num_ready
        # Full replicas are no reason for more: that many requests is what they are meant to hold.
        count = min(count, PANIC_STEP * ready) if count > OVERFULL * ready else min(count, ready)
        text = f"{waiting.num_in_flight} requests are open, {given.capacity.max_batch:.3g} fill a replica"
        return [Reason(count, text)]
    num_open = waiting.num_in_flight + waiting.num_held
    numbers.add("max_running", given.max_running, "requests", "per replica; nothing is measured yet")
    count = num_open / (max(1.0, given.max_running) * given.limits.target_utilization)
    text = (
        f"{num_open} requests are open or held and nothing is measured yet: {given.max_running:g} per replica"
    )
    return [Reason(count, text)]


def _held(given: ScalingInput, numbers: _Numbers) -> list[Reason]:
    """Panic: what is held for too long asks for enough to be gone within one start."""
    waiting, supply = given.waiting, given.supply
    numbers.add("held", waiting.num_held, "requests")
    patience_s = given.limits.ttft_s or DEFAULT_PATIENCE_S
    if waiting.num_held == 0 or given.capacity is None:
        return []
    numbers.add("oldest_held", waiting.oldest_held_s, "s", f"may be {patience_s:g}")
    numbers.add("held_work", waiting.held_work_s, "s", "of full replicas")
    if waiting.oldest_held_s <= patience_s:
        return []
    within_s = max(supply.within_s(), 0.0)
    coming_s = supply.num_ready * within_s
    coming_s += sum(max(0.0, within_s - ready_s) for ready_s in supply.pending_s)
    left_s = max(0.0, waiting.held_work_s + given.demand * within_s - coming_s)
    numbers.add("held_work_then", left_s, "s", "still there when a replica asked for now is ready")
    count = given.demand + left_s / max(MIN_CLEAR_S, within_s)
    bound = max(1.0, PANIC_STEP * supply.num_ready)
    text = f"a request is held for {waiting.oldest_held_s:.1f} s"
    if count > bound:
        text += f"; {count:.2f} would clear what is held soon, but that is more than twice what serves"
    else:
        text += f": {count:.2f} clear what is held within {max(MIN_CLEAR_S, within_s):.3g} s"
    return [Reason(min(count, bound), text)]


def _metrics(given: ScalingInput, numbers: _Numbers) -> list[Reason]:
    reasons = []
    for reading in given.metrics:
        asked, note = replicas_asked(reading)
        numbers.add(f"metric {reading.name}", asked if asked is not None else 0.0, "replicas", note)
        if asked is not None and asked > 0:
            reasons.append(Reason(asked, f"metric {reading.name}: {note}"))
    return reasons


def _describe_supply(given: ScalingInput, numbers: _Numbers) -> None:
    supply, limits = given.supply, given.limits
    numbers.add("ready", supply.num_ready, "replicas")
    if supply.pending_s:
        numbers.add(
            "pending", len(supply.pending_s), "replicas", f"the first in {min(supply.pending_s):.1f} s"
        )
    numbers.add("start_time", supply.start_s, "s", "p95 of the last starts")
    if limits.standby:
        numbers.add("standby", supply.num_standby, "replicas", f"replicas.standby is {limits.standby}")
        numbers.add("promotion_time", supply.promotion_s, "s", "p95 of the last promotions")
    if limits.min_count == 0:
        numbers.add("idle", min(given.idle_s, 1e9), "s", f"zero after {limits.idle_to_zero_s:g}")
