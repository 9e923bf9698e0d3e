"""An endpoint on a virtual clock for the scaler's tests: one router's counters, replicas that start."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import msgspec

from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import EndpointDemand, EngineLoad, EngineReady, LoadReport, StepModel
from headrace.control.scaling import EndpointScaler, ScaledReplica, ScalingObservation
from headrace.policy.autoscaling import ScalingDecision
from headrace.policy.scaling_metrics import MetricReading

STEP = StepModel(a=0.010, b=20e-6, q=0.0, c=0.0005, d=0.0)
PROMPT, OUTPUT = 500.0, 100.0
BATCH = 32
REQUEST_S = PROMPT * STEP.b + OUTPUT * (STEP.c + STEP.a / BATCH)
"""Of a full replica, per request: about 0.09 s."""
NO_DEMAND = EndpointDemand("chat", 0, 0.0, 0, 0, 0, 0, 0, 0)


def endpoint(**changes: object) -> Endpoint:
    tree: dict[str, object] = {
        "model": "m",
        "engine": "simulated",
        "replicas": {"min": 1, "max": 16},
        "native": {"max_running": BATCH},
        "scaling": {"target_utilization": 0.8},
    }
    return Endpoint.model_validate({**tree, **changes})


class ScalingWorld:
    """Replicas follow the scaler's count: each start takes `start_s`. A tick is half a second."""

    def __init__(
        self, config: Endpoint | None = None, start_s: float = 20.0, seed: int = 1, is_measured: bool = True
    ) -> None:
        self.config = config or endpoint()
        self.scaler = EndpointScaler(self.config)
        self.start_s = start_s
        self.now_s = 1000.0
        self.demand = NO_DEMAND
        self.router = "g1/1"
        self.is_complete = True
        self.metrics: list[MetricReading] = []
        self.started: list[float] = []
        self.standby: list[float] = []
        self.is_measured = is_measured
        self.num_open = 0
        """At each replica, by its own word."""
        self.random = random.Random(seed)
        self.decision = ScalingDecision(0, 0, "")
        self.counts: list[int] = []
        self.backlog_s = 0.0

    @property
    def num_ready(self) -> int:
        return sum(self.now_s - started_s >= self.start_s for started_s in self.started)

    def replicas(self) -> list[ScaledReplica]:
        load = EngineLoad(num_running=4, step_model=STEP if self.is_measured else None)
        info = EngineReady("simulated", "m", 1, 4096, 16, 1 << 20, BATCH, "", {})
        replicas = []
        for index, started_s in enumerate(self.started):
            is_ready = self.now_s - started_s >= self.start_s
            report = LoadReport(
                replica_id=f"chat-{index}", endpoint="chat", model="m", address="", pid=1, sequence=1,
                lease_s=3.0, state="ready" if is_ready else "starting", engine=load, engine_info=info,
                num_open=self.num_open,
            )  # fmt: skip
            phase = "ready" if is_ready else "starting"
            replicas.append(ScaledReplica(f"chat-{index}", phase, started_s, report))  # type: ignore[arg-type]
        replicas += [
            ScaledReplica(f"standby-{index}", "standby", since_s)
            for index, since_s in enumerate(self.standby)
        ]
        return replicas

    def arrive(self, num_requests: float, is_finished: bool = True) -> None:
        """Count arrivals, and as many that finished as measured."""
        demand = self.demand
        whole = round(num_requests)
        demand = msgspec.structs.replace(
            demand,
            arrived=demand.arrived + whole,
            arrived_prompt_tokens=demand.arrived_prompt_tokens + whole * PROMPT,
        )
        if is_finished:
            demand = msgspec.structs.replace(
                demand,
                finished=demand.finished + whole,
                measured=demand.measured + whole,
                prompt_tokens=demand.prompt_tokens + round(whole * PROMPT),
                output_tokens=demand.output_tokens + round(whole * OUTPUT),
            )
        self.demand = demand

    def tick(self, seconds: float = 0.5) -> ScalingDecision:
        self.now_s += seconds
        observation = ScalingObservation(
            {self.router: self.demand}, self.replicas(), self.is_complete, self.metrics
        )
        self.scaler.observe(observation, self.now_s)
        self.decision = self.scaler.decide(self.now_s)
        self.counts.append(self.decision.count)
        while len(self.started) < self.decision.count:
            self.started.append(self.now_s)
        del self.started[self.decision.count :]
        return self.decision

    def run(self, seconds: float, rate: Callable[[float], float] | float, noise: bool = True) -> list[int]:
        """Let `rate` requests per second arrive; return the counts of these ticks."""
        begin = len(self.counts)
        for step in range(int(seconds * 2)):
            per_s = rate(step / 2) if callable(rate) else rate
            mean = per_s * 0.5
            num = self.random.gauss(mean, mean**0.5) if noise else mean + self._rounding(mean)
            self.arrive(max(0.0, num))
            self.tick()
        return self.counts[begin:]

    def replicas_worth(self, count: float) -> float:
        """Requests per second that keep so many full replicas busy."""
        return count / REQUEST_S

    def _rounding(self, mean: float) -> float:
        """So that whole requests add up to the rate without noise."""
        self.backlog_s += mean - round(mean)
        whole = round(self.backlog_s)
        self.backlog_s -= whole
        return whole


def changes(counts: list[int]) -> int:
    """Return how often the count changed."""
    return sum(before != after for before, after in pairwise(counts))
