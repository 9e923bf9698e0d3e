"""One endpoint's scaler: takes what is observed, keeps its windows, gives the wanted count. Pure.

Owns the endpoint's measurements and the count's history; `policy.autoscaling` says what is needed,
`policy.scaling_memory` keeps the count steady. Must not know processes, sockets or the fleet: whoever calls
`observe` several times a second and `decide` before each reconciliation does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import EndpointDemand, LoadReport, StepModel
from headrace.control.scaling_windows import (
    CounterBook,
    DemandWindow,
    DurationBook,
    LastUse,
    ObservedTime,
    ShapeMeter,
)
from headrace.policy.autoscaling import (
    Need,
    ScalingDecision,
    ScalingInput,
    ScalingLimits,
    Supply,
    Waiting,
    assess,
)
from headrace.policy.scaling_capacity import (
    Capacity,
    EngineLimits,
    RequestShape,
    capacity_of,
    mean_model,
    measured_ratio,
    model_of_costs,
    times,
)
from headrace.policy.scaling_forecast import NUM_PARTS, Forecast, forecast, window_s
from headrace.policy.scaling_memory import CountKeeper
from headrace.policy.scaling_metrics import MetricReading
from headrace.policy.scaling_shadows import Sample, ShadowFleets, Terms

FIRST_START_S = 15.0
"""What a start is taken to last before one was measured, and a promotion."""
FIRST_PROMOTION_S = 1.0
MIN_LEVEL_S, MAX_LEVEL_S = 5.0, 120.0
"""Bounds of the window that says what demand is now: half as long as a start takes. What is much shorter is
over before a replica that it asks for could serve."""
LEVEL_PARTS = 4
BUSY_MEMORY = 0.02
MAX_CHANGES = 16
MAX_HELD = 1 << 40

Phase = Literal["pending", "starting", "ready", "draining", "failed", "lost", "standby"]


@dataclass(frozen=True, slots=True)
class ScaledReplica:
    """A replica as the scaler must know it. Times are of the clock that `observe` is called with."""

    replica_id: str
    phase: Phase
    started_s: float
    report: LoadReport | None = None
    promoted_s: float | None = None
    """When it was told to leave standby; None: it was not."""


@dataclass(frozen=True, slots=True)
class ScalingObservation:
    """What is seen of one endpoint."""

    demands: Mapping[str, EndpointDemand]
    """The last word of each router, by a name that changes when the router is started anew (`g1/4711`)."""
    replicas: Sequence[ScaledReplica]
    is_complete: bool = True
    """All gateways have said something lately."""
    metrics: Sequence[MetricReading] = ()


@dataclass(slots=True)
class _Change:
    at_s: float
    before: int
    after: int
    reason: str

    def line(self, now_s: float) -> str:
        return f"{now_s - self.at_s:.0f} s ago: {self.before} -> {self.after}: {self.reason}"


@dataclass(slots=True)
class _Engines:
    """What the replicas' engines say of themselves; kept while there are none."""

    model: StepModel | None = None
    mean_running: float = 1.0
    """While busy."""
    max_running: float = 0.0
    num_kv_tokens: float = 0.0
    starting: dict[str, float] = field(default_factory=dict)
    """Replica -> when it was started, of those whose start is being measured."""
    promoted: dict[str, float] = field(default_factory=dict)


class EndpointScaler:
    """Decides one endpoint's count. Made from the endpoint's config; `configure` takes a new one."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._time = ObservedTime()
        self._clock_s = 0.0
        self._counters = CounterBook()
        self._window = DemandWindow()
        self._shape = ShapeMeter()
        self._starts = DurationBook(FIRST_START_S)
        self._promotions = DurationBook(FIRST_PROMOTION_S)
        self._engines = _Engines()
        self._shadows = ShadowFleets()
        self._keeper = CountKeeper()
        self._waiting = Waiting()
        self._held_tokens = 0.0
        self._use = LastUse()
        self._observation: ScalingObservation | None = None
        self._history: deque[_Change] = deque(maxlen=MAX_CHANGES)
        self._endpoint = endpoint
        self._limits = scaling_limits(endpoint)

    def __repr__(self) -> str:
        return f"<EndpointScaler {self._keeper!r}, start {self.start_s:.1f} s>"

    @property
    def start_s(self) -> float:
        """Measured p95 of the last starts, in seconds."""
        return self._starts.p95_s()

    @property
    def promotion_s(self) -> float:
        """Measured p95 of the last promotions from standby, in seconds."""
        return self._promotions.p95_s()

    def configure(self, endpoint: Endpoint) -> None:
        """Take a new config. A lower minimum takes effect as far as demand lets it, at once."""
        limits = scaling_limits(endpoint)
        if limits.min_count < self._limits.min_count:
            self._keeper.forget()
        if limits.min_count:
            self._use.want()
        self._endpoint, self._limits = endpoint, limits

    def end(self) -> None:
        """A user wants no replica, now: what is open may finish, what is held is served first. That stands
        until a later request needs one."""
        self._use.end(self._waiting.num_held)
        self._keeper.forget()

    def observe(self, observation: ScalingObservation, now_s: float) -> None:
        """Take what is seen now."""
        is_first = self._observation is None
        is_steady = self._time.advance(now_s)
        if math.isfinite(now_s):
            self._clock_s = now_s
        self._observation = observation
        growths = self._counters.take(observation.demands)
        num_arrived = sum(growth.requests for growth in growths)
        for growth in growths:
            self._shape.add(growth, self._time.now_s)
        if is_steady:
            tokens = sum(growth.prompt_tokens for growth in growths)
            sample = self._window.add(num_arrived, tokens, self._time.now_s)
            if sample is not None:
                self._observe_work(*sample)
        self._observe_waiting(observation.demands)
        # A router tells of what it has just bound a moment later than the replica itself.
        ready = [each.report for each in observation.replicas if each.phase == "ready" and each.report]
        num_open = max(self._waiting.num_in_flight, sum(report.num_streams for report in ready))
        self._use.observe(num_arrived, self._waiting.num_held, num_open, self._time.now_s)
        self._observe_replicas(observation.replicas)
        if is_first:
            live = [
                replica
                for replica in observation.replicas
                if replica.phase in ("ready", "starting", "pending")
            ]
            self._keeper.begin(min(len(live), self._limits.max_count), self._time.now_s)
            if live:
                self._use.at_s = self._time.now_s  # nobody remembers when it last was

    def decide(self, now_s: float) -> ScalingDecision:
        """Return the wanted count. Without any observation: the least that is allowed."""
        self._time.advance(now_s)
        limits, observation = self._limits, self._observation
        if observation is None:
            return ScalingDecision(limits.min_count, 0, "nothing was observed yet")
        need = assess(self._input(observation))
        before = self._keeper.count or 0
        count = self._keeper.follow(
            need, limits, self.start_s, self._time.now_s, may_fall=observation.is_complete
        )
        reason = self._reason(need, count, observation)
        if count != before:
            self._history.appendleft(_Change(self._time.now_s, before, count, reason))
        standby = min(limits.standby, limits.max_count - count)
        history = tuple(change.line(self._time.now_s) for change in self._history)
        return ScalingDecision(count, standby, reason, need.numbers, history)

    # ---- what is seen

    def _observe_work(self, num_requests: float, num_tokens: float, step_s: float) -> None:
        """Let shadows take what arrived in the last `step_s`."""
        capacity = self._capacity(self._shape.shape())
        if capacity is None or self._limits.ttft_s <= 0:
            return
        work_s = num_requests * capacity.request_s + num_tokens * capacity.prompt_token_s
        sample = Sample(work_s, num_requests, self._level(capacity, self.start_s), step_s)
        self._shadows.observe(sample, self._terms(capacity), self._time.now_s)

    def _terms(self, capacity: Capacity) -> Terms:
        limits = self._limits
        window_s = max(limits.down_after_s, self.start_s)
        usual_s = self._starts.median_s()
        return Terms(window_s, usual_s, limits.slack_s(capacity), limits.min_count, limits.max_count)

    def _observe_waiting(self, demands: Mapping[str, EndpointDemand]) -> None:
        held = in_flight = 0
        oldest_s = tokens = 0.0
        for demand in demands.values():
            if 0 <= demand.num_held <= MAX_HELD and 0 <= demand.num_in_flight <= MAX_HELD:
                held += demand.num_held
                in_flight += demand.num_in_flight
            if demand.num_held and 0 <= demand.oldest_held_s < math.inf:
                oldest_s = max(oldest_s, demand.oldest_held_s)
            if 0 <= demand.held_prompt_tokens < math.inf:
                tokens += demand.held_prompt_tokens
        self._waiting = Waiting(held, oldest_s, 0.0, in_flight)
        self._held_tokens = tokens

    def _observe_replicas(self, replicas: Sequence[ScaledReplica]) -> None:
        engines = self._engines
        models, max_running, kv_tokens = [], [], []
        known = set()
        for replica in replicas:
            known.add(replica.replica_id)
            self._measure_start(replica)
            report = replica.report
            info, load = (report.engine_info, report.engine) if report is not None else (None, None)
            if info is not None and info.max_running > 0:
                max_running.append(float(info.max_running))
                kv_tokens.append(float(max(0, info.num_total_blocks) * max(0, info.block_size)))
            if load is not None and replica.phase == "ready":
                if 0 < load.num_running <= MAX_HELD:
                    engines.mean_running += (load.num_running - engines.mean_running) * BUSY_MEMORY
                model = load.step_model or model_of_costs(
                    load.prefill_token_s, load.decode_token_s, load.step_per_request_s, engines.mean_running
                )
                if model is not None:
                    models.append(model)
        for measured in (engines.starting, engines.promoted):
            for replica_id in [name for name in measured if name not in known]:
                del measured[replica_id]
        engines.model = mean_model(models) or engines.model
        if max_running:
            engines.max_running = sum(max_running) / len(max_running)
            engines.num_kv_tokens = sum(kv_tokens) / len(kv_tokens)

    def _measure_start(self, replica: ScaledReplica) -> None:
        """Measure the time from start to ready or standby, and from promotion to ready, once each."""
        engines, name = self._engines, replica.replica_id
        if replica.phase in ("starting", "pending"):
            engines.starting[name] = replica.started_s
        elif engines.starting.pop(name, None) == replica.started_s and replica.phase in ("ready", "standby"):
            self._starts.add(self._clock_s - replica.started_s)
        if replica.phase == "standby":
            if replica.promoted_s is not None:
                engines.promoted[name] = replica.promoted_s
        elif engines.promoted.pop(name, None) is not None and replica.phase == "ready" and replica.promoted_s:
            self._promotions.add(self._clock_s - replica.promoted_s)

    # ---- what follows

    def _input(self, observation: ScalingObservation) -> ScalingInput:
        shape = self._shape.shape()
        capacity = self._capacity(shape)
        given = ScalingInput(
            limits=self._limits,
            supply=self._supply(observation.replicas),
            waiting=self._waiting,
            max_running=self._max_running,
            idle_s=self._time.now_s - self._use.at_s,
            metrics=observation.metrics,
            is_ended=self._use.is_ended,
        )
        if capacity is None:
            return given
        at_start = self._forecast(capacity, self.start_s)
        held_s = self._waiting.num_held * capacity.request_s + self._held_tokens * capacity.prompt_token_s
        return replace(
            given,
            demand=at_start.level,
            capacity=capacity,
            dispersion_s=self._window.dispersion_s(capacity.request_s, capacity.prompt_token_s),
            at_start=at_start,
            learned=self._shadows.choose(self._limits.attainment_ratio, self._terms(capacity)),
            at_promotion=self._forecast(capacity, self.promotion_s) if self._limits.standby else None,
            waiting=replace(self._waiting, held_work_s=held_s),
        )

    @property
    def _max_running(self) -> float:
        return min(self._engines.max_running or self._endpoint.native.max_running, self._endpoint.max_open)

    def _capacity(self, shape: RequestShape | None) -> Capacity | None:
        model = self._engines.model
        if shape is None or model is None:
            return None
        limits = EngineLimits(
            self._max_running,
            self._engines.num_kv_tokens,
            self._endpoint.native.token_budget,
            self._limits.itl_s,
        )
        ratio = measured_ratio(self._shape.engine_s(), model, shape, self._engines.mean_running)
        capacity = capacity_of(times(model, ratio), shape, limits)
        return capacity if 0 < capacity.mean_request_s < math.inf else None

    def _forecast(self, capacity: Capacity, horizon_s: float) -> Forecast:
        seconds = window_s(horizon_s)
        num_parts = NUM_PARTS if self._window.length_s >= seconds else 0
        edges = (
            [seconds * (num_parts - part) / NUM_PARTS for part in range(num_parts + 1)] if num_parts else []
        )

        parts = [_demand(capacity, rate) for rate in self._window.rates(edges)]
        return forecast(parts, self._level(capacity, horizon_s), horizon_s)

    def _level(self, capacity: Capacity, horizon_s: float) -> float:
        """Return the demand of now: its mean over the window, or the median of the window's quarters, which
        knows a step after half of it and of a single burst nothing."""
        seconds = min(MAX_LEVEL_S, max(MIN_LEVEL_S, horizon_s / 2))
        edges = [seconds * (LEVEL_PARTS - part) / LEVEL_PARTS for part in range(LEVEL_PARTS + 1)]
        parts = [_demand(capacity, rate) for rate in self._window.rates(edges)]
        return max(median(parts), _demand(capacity, self._window.rates([seconds, 0.0])[0]))

    def _supply(self, replicas: Sequence[ScaledReplica]) -> Supply:
        start_s = self.start_s
        pending = []
        for replica in replicas:
            if replica.phase == "starting":
                pending.append(max(0.0, start_s - max(0.0, self._clock_s - replica.started_s)))
            elif replica.phase == "pending":
                pending.append(start_s)
        phases = [replica.phase for replica in replicas]
        return Supply(
            phases.count("ready"), tuple(pending), phases.count("standby"), start_s, self.promotion_s
        )

    def _reason(self, need: Need, count: int, observation: ScalingObservation) -> str:
        limits = self._limits
        needed = max(need.count, need.hurried)
        if needed > count:
            return f"{need.reason}; replicas.max is {limits.max_count}"
        if count > max(need.floor, math.ceil(needed - 1e-6)):
            if not observation.is_complete:
                return f"{need.reason}; none is taken away while a gateway is silent"
            window = self._keeper.window_s(limits, self.start_s)
            return f"{need.reason}; {count} stay until fewer have sufficed for {window:.0f} s"
        return need.reason


def _demand(capacity: Capacity, rate: tuple[float, float]) -> float:
    """Return the full replicas that so many requests and prompt tokens per second keep busy."""
    return rate[0] * capacity.request_s + rate[1] * capacity.prompt_token_s


def scaling_limits(endpoint: Endpoint) -> ScalingLimits:
    """Return what an endpoint's config says about its count."""
    replicas, scaling, slo = endpoint.replicas, endpoint.scaling, endpoint.slo
    return ScalingLimits(
        min_count=replicas.min,
        max_count=replicas.max,
        standby=replicas.standby,
        target_utilization=scaling.target_utilization,
        down_after_s=scaling.down_after_s,
        idle_to_zero_s=scaling.idle_to_zero_s,
        ttft_s=slo.ttft_ms / 1000,
        itl_s=slo.itl_ms / 1000,
        attainment_ratio=slo.attainment_ratio,
    )
