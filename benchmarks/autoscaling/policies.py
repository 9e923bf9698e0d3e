"""The policies that are compared: headrace's own scaler, fixed fleets, proportional formulas, an oracle.

Knative's and Ray Serve's formulas are written from their public documentation (Knative "Autoscaling", "About
autoscaling: panic mode" and its configmap's defaults; Ray Serve "AutoscalingConfig") with their default
windows, delays and rates; only the target is varied. Must not know the fleet's inside.
"""

from __future__ import annotations

import math
from collections import deque

from benchmarks.autoscaling.fluid import View, World
from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import EndpointDemand, EngineLoad, EngineReady, LoadReport
from headrace.control.scaling import EndpointScaler, ScaledReplica, ScalingObservation
from headrace.policy.autoscaling import ScalingDecision

MAX_REPLICAS = 1024


class Headrace:
    """The real EndpointScaler, told what a router and the replicas would tell it."""

    name = "headrace"

    period_s = 2

    def __init__(self, world: World, attainment_ratio: float = 0.99, down_after_s: float = 60.0) -> None:
        self.setting = f"attainment_ratio {attainment_ratio:g}, down_after_s {down_after_s:g}"
        self._world = world
        self._info = EngineReady("native", "m", 1, 1 << 20, 16, 0, world.kind.max_running, "", {})
        self.scaler = EndpointScaler(
            Endpoint.model_validate(
                {
                    "model": "m",
                    "max_open": 2 * world.kind.max_running,
                    "native": {"max_running": world.kind.max_running},
                    "replicas": {"min": 1, "max": MAX_REPLICAS},
                    "slo": {
                        "ttft_ms": 1e3 * world.kind.ttft_s,
                        "itl_ms": 1e3 * world.kind.itl_s,
                        "attainment_ratio": attainment_ratio,
                    },
                    "scaling": {"down_after_s": down_after_s},
                }
            )
        )
        self.decision = ScalingDecision(0, 0, "")

    def watch(self, view: View) -> None:
        """Observe, as the controller does between decisions."""
        observation = ScalingObservation({"g1/1": self._demand(view)}, self._replicas(view))
        self.scaler.observe(observation, float(view.second))

    def decide(self, view: View) -> int:
        self.decision = self.scaler.decide(float(view.second))
        return self.decision.count

    def _demand(self, view: View) -> EndpointDemand:
        shape = self._world.shape
        served = int(view.served)
        return EndpointDemand(
            endpoint="chat",
            num_held=round(view.num_held),
            oldest_held_s=view.oldest_s,
            num_in_flight=round(view.in_flight),
            arrived=round(view.arrived),
            finished=served,
            aborted=0,
            refused=0,
            failed=0,
            arrived_prompt_tokens=view.arrived_prompt,
            measured=served,
            prompt_tokens=round(view.served_prompt),
            output_tokens=round(view.served_output),
            held_prompt_tokens=view.num_held * shape.prompt_tokens,
        )

    def _replicas(self, view: View) -> list[ScaledReplica]:
        running = math.ceil(view.in_flight / max(1, len(view.ready)))
        load = EngineLoad(num_running=running, step_model=self._world.kind.model)
        report = LoadReport(
            replica_id="", endpoint="chat", model="m", address="", pid=1, sequence=1, lease_s=3.0,
            state="ready", engine=load, engine_info=self._info,
        )  # fmt: skip
        replicas = [
            ScaledReplica(f"chat-{one.number}", "ready", float(one.asked_s), report) for one in view.ready
        ]
        replicas += [
            ScaledReplica(f"chat-{start.number}", "starting", float(start.asked_s)) for start in view.starting
        ]
        return replicas


class Static:
    """Always so many."""

    period_s = 1 << 30

    def __init__(self, count: int, setting: str) -> None:
        self.name, self.setting, self.count = "static", setting, count

    def decide(self, view: View) -> int:
        return self.count


class Knative:
    """Average concurrency over the target, over a stable window of 60 s and a panic window of 6 s: panic
    while the latter asks for twice what is ready, then never down for 60 s. Down by half per tick at most."""

    name, period_s = "Knative", 2

    def __init__(self, world: World, target_ratio: float) -> None:
        self._target = max(1.0, target_ratio * world.capacity.max_batch)
        self.setting = f"target {self._target:.3g} requests per replica ({target_ratio:.0%} of a full batch)"
        self._samples: deque[float] = deque(maxlen=60 // self.period_s)
        self._panic_s = -math.inf
        self._panic_count = 0

    def decide(self, view: View) -> int:
        self._samples.append(view.num_held + view.in_flight)
        num_panic = 6 // self.period_s
        recent = list(self._samples)[-num_panic:]
        ready = max(1, len(view.ready))
        stable = math.ceil(sum(self._samples) / len(self._samples) / self._target)
        panic = math.ceil(sum(recent) / len(recent) / self._target)
        stable = max(stable, ready // 2)
        if panic / ready >= 2:
            self._panic_s = view.second
        if view.second - self._panic_s < 60:
            self._panic_count = max(self._panic_count, panic, len(view.ready))
            return max(1, self._panic_count)
        self._panic_count = 0
        return min(MAX_REPLICAS, max(1, stable))


class RayServe:
    """Replicas times (ongoing requests per replica over the target), averaged over 30 s; up when that was
    wanted for 30 s, down when for 600 s."""

    name, period_s = "Ray Serve", 2

    def __init__(self, world: World, target_ratio: float) -> None:
        self._target = max(1.0, target_ratio * world.capacity.max_batch)
        self.setting = f"target {self._target:.3g} requests per replica ({target_ratio:.0%} of a full batch)"
        self._samples: deque[float] = deque(maxlen=30 // self.period_s)
        self._count = 0
        self._run = 0
        """Decisions in a row: up above zero, down below."""

    def decide(self, view: View) -> int:
        self._samples.append(view.num_held + view.in_flight)
        if self._count == 0:
            self._count = max(1, len(view.ready))
        running = max(1, len(view.ready))
        ratio = sum(self._samples) / len(self._samples) / running / self._target
        wanted = min(MAX_REPLICAS, max(1, math.ceil(running * ratio)))
        if wanted > self._count:
            self._run = max(0, self._run) + 1
            if self._run > 30 / self.period_s:
                self._count, self._run = wanted, 0
        elif wanted < self._count:
            self._run = min(0, self._run) - 1
            if self._run < -600 / self.period_s:
                self._count, self._run = wanted, 0
        else:
            self._run = 0
        return self._count


class Oracle:
    """Knows what arrives in its coming period, and its replicas start at once: as many as serve that and what
    waits within the period, busy to `utilization`. The fluid queue must be run without start times."""

    name = "oracle"

    def __init__(self, world: World, utilization: float) -> None:
        self.setting = f"utilization {utilization:g}"
        self.period_s = world.period_s
        self._utilization = utilization
        work = world.work()
        usable = len(work) // self.period_s * self.period_s
        self._coming = work[:usable].reshape(-1, self.period_s).sum(axis=1).tolist()

    def decide(self, view: View) -> int:
        index = view.second // self.period_s
        coming = self._coming[index] if index < len(self._coming) else 0.0
        return max(1, math.ceil((view.backlog_s + coming) / self.period_s / self._utilization - 1e-9))
