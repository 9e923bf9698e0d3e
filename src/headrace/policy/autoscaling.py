"""How many replicas an endpoint needs now, and why: each reason's own number, the largest wins. Pure.

Owns what speaks for replicas: work that comes, open requests, held ones, custom metrics. Must not know how
demand is measured, nor what was decided before (`scaling_memory` keeps counts steady).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.api.messages import ExplainedNumber, Explanation
from headrace.policy.scaling_capacity import Capacity
from headrace.policy.scaling_forecast import Forecast
from headrace.policy.scaling_metrics import MetricReading, replicas_asked
from headrace.policy.scaling_queue import replicas_within
from headrace.policy.scaling_shadows import Choice

DEFAULT_PATIENCE_S = 1.0
"""Where no TTFT is promised: a request held for longer is a reason to hurry."""
FIXED_UTILIZATION = 0.7
"""Where no TTFT is promised, and until shadows have watched for long enough to know better."""
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
    target_utilization: float | None = None
    """None: as high as the SLO lets it be."""
    down_after_s: float = 60.0
    idle_to_zero_s: float = 300.0
    ttft_s: float = 0.0
    itl_s: float = 0.0
    attainment_ratio: float = 0.99

    def slack_s(self, capacity: Capacity) -> float:
        """Return what the TTFT's SLO leaves for waiting, in seconds; 0: nothing is promised."""
        return max(self.ttft_s - capacity.prefill_s, self.ttft_s * MIN_SLACK_RATIO)


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
    learned: Choice | None = None
    """What shadows say of the room that demand needs; None: no TTFT is promised, or nothing is known."""
    metrics: Sequence[MetricReading] = ()
    is_ended: bool = False
    """A user took it to zero, and no request has needed a replica since."""


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
    hurried: float
    """By what is held for too long: asked for now, and no longer than it is held."""
    reason: str
    floor: int
    """Fewest replicas now, whatever demand is: replicas.min, or one while there are requests."""
    is_learned: bool
    """What is kept for later is in the count, as far as it pays."""
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
    reasons = [*_work(given, numbers), *_open(given, numbers)]
    hurry = _held(given, numbers)
    if floor.count == 0:
        reasons = []  # the gateways are idle for as long as the user said: rates fade more slowly
    reasons += _metrics(given, numbers)
    lasting = max((reason.count for reason in reasons), default=0.0)
    most = max([*reasons, hurry], key=lambda reason: reason.count)
    text = most.text if most.count > floor.count else floor.text
    _describe_supply(given, numbers)
    is_learned = given.learned is not None and given.learned.is_mature
    return Need(
        _within(lasting), _within(hurry.count), text, int(floor.count), is_learned, tuple(numbers.all)
    )


def _within(count: float) -> float:
    return min(max(0.0, count), float(MAX_COUNT))


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
    if given.is_ended:
        return Reason(0, f"a user took it to zero; {waiting.num_in_flight} open requests may finish")
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
    reasons, soon, later = [], given.at_promotion, given.at_start
    # Those on standby are there sooner: what they can take over need not be started now.
    num_standby = min(given.supply.num_standby, limits.standby)
    target, note = _target(given)
    numbers.add("target_utilization", target, "ratio", note)
    if given.supply.num_standby and soon is not None:
        numbers.add("forecast_promotion", soon.value, "replicas", soon.method)
        reasons.append(_work_reason(_replicas_for(soon.value, target, given, None), soon, given.demand))
    learned = given.learned
    if learned is None or not learned.is_mature:
        numbers.add("forecast", later.value, "replicas", f"{later.method}; {later.horizon_s:.3g} s ahead")
        count = _replicas_for(later.value, target, given, numbers) - num_standby
        reasons.append(_work_reason(count, later, given.demand))
    else:
        count = _replicas_for(given.demand, target, given, numbers) - num_standby
        level = replace(later, value=given.demand)
        reasons.append(_work_reason(count, level, given.demand))
    if learned is not None:
        reasons.append(_learned(learned, given, num_standby, numbers))
    return reasons


def _target(given: ScalingInput) -> tuple[float, str]:
    """Return how busy replicas may be before their waits are asked, and why."""
    target = given.limits.target_utilization
    if target is not None:
        return target, "scaling.target_utilization"
    if given.limits.ttft_s <= 0:
        return FIXED_UTILIZATION, "where slo.ttft promises nothing"
    if given.learned is None or not given.learned.is_mature:
        return FIXED_UTILIZATION, "until shadows have watched for longer"
    return 1.0, "waits and growth are looked at by themselves"


def _learned(learned: Choice, given: ScalingInput, num_standby: int, numbers: _Numbers) -> Reason:
    """Replicas for what demand may grow to while one starts, by what it did before."""
    watched = f"of {learned.watched_s / 3600:.3g} h, the last day most"
    numbers.add("margin", learned.margin, "ratio", "for growth during a start: the cheapest that suffices")
    numbers.add("hold", learned.hold_s, "s", "for which what was needed is kept, likewise")
    numbers.add("held_demand", learned.base, "replicas", "full ones; the most that is kept")
    numbers.add("shadow_late", learned.late_ratio, "ratio", f"late by this rule, {watched}")
    numbers.add("shadow_cost", learned.cost_ratio, "ratio", "replicas paid for over those that work needed")
    count = learned.count - num_standby
    text = f"work for {given.demand:.2f} full replicas arrives"
    if learned.base > given.demand * 1.01:
        text += f", {learned.base:.2f} at times in the last {learned.hold_s:.0f} s"
    text += f"; with {learned.margin:.0%} more for growth {count:.2f} replicas are needed: such a rule"
    return Reason(count, f"{text} served {1 - learned.late_ratio:.2%} within the SLO")


def _work_reason(count: float, expected: Forecast, demand: float) -> Reason:
    text = f"work for {demand:.2f} full replicas arrives"
    if expected.value > demand * 1.01:
        text += f", {expected.value:.2f} expected in {expected.horizon_s:.3g} s"
    return Reason(count, f"{text}: {count:.2f} keep it within the SLO and the target utilization")


def _replicas_for(demand: float, target: float, given: ScalingInput, numbers: _Numbers | None) -> float:
    """Replicas for so much demand: busy to the target at most, and with waits within the SLO."""
    limits, capacity = given.limits, given.capacity
    assert capacity is not None
    by_target = demand / target
    if limits.ttft_s <= 0 or demand <= 0:
        return by_target
    slack_s, late_ratio = limits.slack_s(capacity), 1 - limits.attainment_ratio
    learned = given.learned
    if learned is not None and learned.is_mature and learned.sample_s <= slack_s:
        return by_target  # shadows wait as requests do
    by_wait = replicas_within(demand, given.dispersion_s, slack_s, late_ratio)
    if numbers is not None:
        numbers.add(
            "wait_slack", slack_s, "s", f"of slo.ttft, after {capacity.prefill_s:.3g} s for the prompt"
        )
        text = f"most that keeps {late_ratio:.2%} of the waits beyond it"
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
    count = num_open / (max(1.0, given.max_running) * _target(given)[0])
    text = (
        f"{num_open} requests are open or held and nothing is measured yet: {given.max_running:g} per replica"
    )
    return [Reason(count, text)]


def _held(given: ScalingInput, numbers: _Numbers) -> Reason:
    """Panic: what is held for too long asks for enough to be gone within one start."""
    waiting, supply = given.waiting, given.supply
    numbers.add("held", waiting.num_held, "requests")
    patience_s = given.limits.ttft_s or DEFAULT_PATIENCE_S
    if waiting.num_held == 0 or given.capacity is None:
        return Reason(0.0, "")
    numbers.add("oldest_held", waiting.oldest_held_s, "s", f"may be {patience_s:g}")
    numbers.add("held_work", waiting.held_work_s, "s", "of full replicas")
    if waiting.oldest_held_s <= patience_s:
        return Reason(0.0, "")
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
    return Reason(min(count, bound), text)


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
