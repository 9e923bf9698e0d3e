"""A fleet as a fluid queue, second by second: what arrives, what a policy asks for, what waits.

Work is in seconds of a full replica. First come, first served; a replica that is asked for serves after its
start time and costs from the moment it is asked for; one that is given up costs nothing from then on, and
those that still start are given up first. Must not know policies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from benchmarks.autoscaling.traces import Floats, Trace
from headrace.api.messages import StepModel
from headrace.policy.scaling_capacity import Capacity, EngineLimits, RequestShape, capacity_of

WARM_S, WARM_UTILIZATION = 60, 0.7
"""Every policy begins with the replicas that the first minute keeps this busy, and watches that long."""


@dataclass(frozen=True)
class Kind:
    """A kind of replica, and what users are promised on it."""

    name: str
    model: StepModel
    max_running: int
    ttft_s: float
    itl_s: float
    start_s: float
    """p95 of start times; they are log-normal."""


class World:
    """One trace on one kind of replica, with what users are promised."""

    def __init__(self, trace: Trace, kind: Kind, period_s: int) -> None:
        self.trace = trace
        self.kind = kind
        self.period_s = period_s
        """headrace and the oracle decide so often; peers by their own defaults."""
        self.shape = RequestShape(trace.mean_prompt, 0.0, trace.mean_output)
        self.capacity = capacity_of(kind.model, self.shape, EngineLimits(kind.max_running, itl_s=kind.itl_s))
        self.slack_s = max(0.1 * kind.ttft_s, kind.ttft_s - self.capacity.prefill_s)
        """What the SLO leaves for waiting."""
        self._minutes = self._by_minute()

    def work(self) -> Floats:
        """Return the work that arrives in each second."""
        token_s = self.capacity.request_s / self.shape.output_tokens
        prompts = self.trace.prompt_tokens * self.capacity.prompt_token_s
        return prompts + self.trace.output_tokens * token_s

    def in_flight(self, second: int, served_s: float, num_ready: int) -> float:
        """Return the requests in the engines while they do `served_s` of work per second, of requests as
        they are in that minute."""
        if served_s <= 0 or num_ready == 0:
            return 0.0
        shape, capacity = self._minutes[min(second // 60, len(self._minutes) - 1)]
        per_s = served_s / capacity.mean_request_s
        busy = min(0.999, per_s * capacity.work_s / num_ready)
        decoding = per_s * shape.output_tokens * self.kind.model.a / (1 - busy)
        return min(num_ready * capacity.max_batch, decoding)

    def _by_minute(self) -> list[tuple[RequestShape, Capacity]]:
        """Return the mean request of each minute, and what such requests cost."""
        trace, limits = self.trace, EngineLimits(self.kind.max_running, itl_s=self.kind.itl_s)
        starts = np.arange(0, trace.num_seconds, 60)
        series = (trace.requests, trace.prompt_tokens, trace.output_tokens)
        found, shape = [], self.shape
        for requests, prompts, outputs in zip(
            *(np.add.reduceat(each, starts) for each in series), strict=True
        ):
            if requests > 0:
                shape = RequestShape(float(prompts / requests), 0.0, float(outputs / requests))
            found.append((shape, capacity_of(self.kind.model, shape, limits)))
        return found


class Start(NamedTuple):
    """A replica from the moment when it is asked for."""

    number: int
    asked_s: int
    ready_s: float
    """Not known to policies."""


@dataclass(slots=True)
class View:
    """What a policy may see."""

    second: int
    ready: list[Start]
    """Replicas that serve, in the order in which they became ready."""
    starting: list[Start]
    backlog_s: float
    oldest_s: float
    num_held: float
    in_flight: float
    arrived: float
    """Totals, as are the next four."""
    arrived_prompt: float
    served: float
    """Requests, and tokens of them."""
    served_prompt: float
    served_output: float


class Policy(Protocol):
    """Wants a number of replicas."""

    name: str
    setting: str
    period_s: int

    def decide(self, view: View) -> int: ...


@runtime_checkable
class Watching(Protocol):
    """A policy that looks every second."""

    def watch(self, view: View) -> None: ...


@runtime_checkable
class Fixed(Protocol):
    """A policy that never changes its count."""

    count: int


@dataclass(frozen=True)
class Outcome:
    """What a policy cost, and what users got."""

    policy: str
    setting: str
    replica_hours: float
    attainment: float
    """Part of the requests within the SLO."""
    num_changes: int
    mean_ready: float


def simulate(world: World, policy: Policy, seed: int = 7, *, is_lagging: bool = True) -> Outcome:
    """Run a policy over the whole trace. Without lag: replicas serve at once."""
    work = world.work()
    random = np.random.default_rng(seed)
    times = np.minimum(np.exp(random.normal(np.log(0.8), 0.136, 20_000)), 2.0) * world.kind.start_s
    times *= is_lagging
    starts = zip(itertools.count(), itertools.cycle(times.tolist()), strict=False)
    arrivals, tokens, done = world.trace.requests.tolist(), world.trace.prompt_tokens.tolist(), work.tolist()
    size, mean_s = world.trace.num_seconds, world.capacity.mean_request_s
    capacity = np.zeros(size)
    view = View(0, [], [], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    num_changes, cost_s, head = 0, 0.0, 0
    wanted = policy.count if isinstance(policy, Fixed) else math.ceil(work[:WARM_S].mean() / WARM_UTILIZATION)
    view.ready = [Start(number, 0, 0.0) for number, _ in itertools.islice(starts, wanted)]
    watching = policy if isinstance(policy, Watching) else None
    served_work, head_end = 0.0, done[0]
    outputs = world.trace.output_tokens.tolist()
    for second in range(size):
        view.second = second
        if watching is not None:
            watching.watch(view)
        if second % policy.period_s == 0:
            count = policy.decide(view)
            if count != wanted and second >= WARM_S:
                num_changes += 1
                _apply(view, count, second, starts)
                wanted = count
        if view.starting:
            view.ready += [start for start in view.starting if start.ready_s <= second]
            view.starting = [start for start in view.starting if start.ready_s > second]
        ready = len(view.ready)
        cost_s += ready + len(view.starting)
        capacity[second] = ready
        total = view.backlog_s + done[second]
        served = ready if ready < total else total
        view.backlog_s = total - served
        served_work += served
        while head < second and head_end <= served_work + 1e-4:
            view.served += arrivals[head]
            view.served_prompt += tokens[head]
            view.served_output += outputs[head]
            head += 1
            head_end += done[head]
        view.oldest_s = second - head if view.backlog_s > 1e-6 else 0.0
        view.num_held = view.backlog_s / mean_s
        view.in_flight = world.in_flight(second, served, ready)
        view.arrived += arrivals[second]
        view.arrived_prompt += tokens[second]
    return Outcome(
        policy.name,
        policy.setting,
        cost_s / 3600,
        attainment(world, work, capacity),
        num_changes,
        float(capacity.mean()),
    )


def attainment(world: World, work: Floats, capacity: Floats) -> float:
    """Return the part of the requests that wait no longer than the SLO leaves them: those of a second are
    served when all work before the middle of theirs is."""
    arrived = np.cumsum(work)
    backlog = np.zeros(len(work))
    left = 0.0
    for second, (more, room) in enumerate(zip(work.tolist(), capacity.tolist(), strict=True)):
        left = left + more - room
        if left < 0:
            left = 0.0
        backlog[second] = left
    served = arrived - backlog
    own_end = arrived - work / 2
    times = np.searchsorted(served, own_end - 1e-9)
    # Within the second in which it is served it comes at its part of what that second serves.
    before = np.where(times > 0, served[np.maximum(times - 1, 0)], 0.0)
    room = np.maximum(capacity[np.minimum(times, len(work) - 1)], 1e-9)
    part = np.clip((own_end - before) / room, 0.0, 1.0)
    waits = np.maximum(0.0, times + part - (np.arange(len(work)) + 0.5))
    waits = np.where(times >= len(work), np.inf, waits)
    is_within = waits <= world.slack_s + 0.5  # half a second is the grain of the simulation
    return float((world.trace.requests * is_within).sum() / world.trace.requests.sum())


def _apply(view: View, count: int, second: int, starts: Iterator[tuple[int, float]]) -> None:
    surplus = len(view.ready) + len(view.starting) - count
    while surplus > 0 and view.starting:
        view.starting.pop()
        surplus -= 1
    if surplus > 0:
        del view.ready[len(view.ready) - surplus :]
    for _ in range(-surplus):
        number, start_s = next(starts)
        view.starting.append(Start(number, second, second + start_s))
