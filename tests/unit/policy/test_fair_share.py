"""Shares over time: the fair queue and the work model before a step-time model of an engine, on virtual time.

The same figures as `python -m benchmarks fairness` takes of a whole system, without its noise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from headrace.policy.admission import AdmissionQueue, FifoQueue, HeldRequest
from headrace.policy.fairness import FairQueue
from headrace.policy.prompt import PromptHead
from headrace.policy.virtual_counters import Share
from headrace.policy.work import LengthMean, WorkModel

pytestmark = pytest.mark.slow
STEP_S = 0.02
PREFILL_TOKEN_S = 0.0002


@dataclass
class Load:
    """A tenant's closed loop: so many requests at a time, lengths from these ranges."""

    tenant: str
    concurrency: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]


@dataclass
class Request:
    load: Load
    arrived_s: float
    prompt: int
    output: int
    charged: float = 0.0
    num_done: int = 0


@dataclass
class Outcome:
    """What each tenant got."""

    work_s: dict[str, float] = field(default_factory=dict)
    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0

    def p99(self, tenant: str) -> float:
        return sorted(self.ttft_s[tenant])[int(0.99 * len(self.ttft_s[tenant]))]

    def jain(self, weights: dict[str, float] | None = None) -> float:
        """Jain's index of the work per weight: 1 is equal, 1/n is one takes all."""
        shares = [work / (weights or {}).get(tenant, 1.0) for tenant, work in self.work_s.items()]
        return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


class Simulation:
    """One engine of `num_slots`, fed from `queue` as soon as a slot is free."""

    def __init__(self, queue: AdmissionQueue, loads: Sequence[Load], num_slots: int, seed: int = 7) -> None:
        self.queue = queue
        self.num_slots = num_slots
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.model = WorkModel()
        self.model.observe_costs(PREFILL_TOKEN_S, STEP_S / num_slots, 0.0)
        self.means = {load.tenant: LengthMean(100.0) for load in loads}
        self.known: dict[str, Request] = {}
        self.running: list[Request] = []
        self.outcome = Outcome({load.tenant: 0.0 for load in loads}, {load.tenant: [] for load in loads})
        for load in loads:
            for _ in range(load.concurrency):
                self.arrive(load)

    def arrive(self, load: Load) -> None:
        request_id = f"r{len(self.known)}"
        prompt, output = self.rng.randint(*load.prompt_tokens), self.rng.randint(*load.output_tokens)
        self.known[request_id] = Request(load, self.now_s, prompt, output)
        assert self.queue.offer(HeldRequest(request_id, self.now_s, load.tenant))

    def bind(self) -> None:
        while len(self.running) < self.num_slots and (held := self.queue.peek(self.now_s)) is not None:
            request = self.known[held.request_id]
            if isinstance(self.queue, FairQueue):
                head = PromptHead(num_bytes=4 * request.prompt)
                output = self.model.expected_output_tokens(head, self.means[held.tenant])
                request.charged = self.model.work(self.model.expected_prompt_tokens(head), output)
                self.queue.take(request.charged)
            else:
                self.queue.take()
            self.running.append(request)

    def step(self) -> None:
        self.bind()
        new = [request for request in self.running if request.num_done == 0]
        self.now_s += STEP_S + PREFILL_TOKEN_S * sum(request.prompt for request in new)
        for request in new:
            self.outcome.ttft_s[request.load.tenant].append(self.now_s - request.arrived_s)
        for request in self.running:
            request.num_done += 1
            self.outcome.num_tokens += 1
            tenant = request.load.tenant
            work = self.model.work(request.prompt if request.num_done == 1 else 0, 1)
            self.outcome.work_s[tenant] += work
            if request.num_done == request.output:
                if isinstance(self.queue, FairQueue):
                    actual = self.model.work(request.prompt, request.output)
                    self.queue.charge(tenant, actual - request.charged)
                self.means[tenant].learn(request.output)
                self.arrive(request.load)
        self.running = [request for request in self.running if request.num_done < request.output]

    def run(self, seconds: float) -> Outcome:
        while self.now_s < seconds:
            self.step()
            if isinstance(self.queue, FairQueue):
                self.queue.check_integrity()
        return self.outcome


LIGHT = Load("light", 4, (200, 300), (20, 60))
HEAVY = Load("heavy", 80, (10, 30), (100, 300))


def test_a_light_tenants_wait_under_a_flood_is_near_what_it_is_alone() -> None:
    def p99(queue: AdmissionQueue, *loads: Load) -> float:
        simulation = Simulation(queue, loads, num_slots=64)
        simulation.run(20)
        simulation.outcome.ttft_s["light"].clear()  # everybody came at once
        return simulation.run(320).p99("light")

    alone = p99(FairQueue(4096), LIGHT)
    assert p99(FairQueue(4096), LIGHT, HEAVY) / alone <= 1.2
    assert p99(FifoQueue(4096), LIGHT, HEAVY) / alone > 10, "it is a flood"


def test_equal_tenants_get_equal_work_whatever_their_requests_look_like() -> None:
    loads = [
        Load("short", 40, (10, 50), (10, 40)),
        Load("long answers", 40, (10, 50), (200, 400)),
        Load("long prompts", 40, (1000, 3000), (5, 20)),
        Load("mixed", 40, (10, 1000), (10, 400)),
    ]
    outcome = Simulation(FairQueue(4096), loads, 16).run(600)
    assert outcome.jain() >= 0.98, outcome.work_s
    assert Simulation(FifoQueue(4096), loads, 16).run(600).jain() < 0.9, "the loads differ"


def test_weights_share_the_work_of_a_backlog() -> None:
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    loads = [Load(name, 60, (10, 200), (20, 200)) for name in weights]
    queue = FairQueue(4096, {name: Share(weight) for name, weight in weights.items()})
    outcome = Simulation(queue, loads, 16).run(400)
    assert outcome.jain(weights) >= 0.98, outcome.work_s
    assert outcome.work_s["four"] / outcome.work_s["one"] == pytest.approx(4, rel=0.1)


def test_fairness_costs_no_throughput() -> None:
    loads = [Load(name, 30, (10, 200), (20, 200)) for name in "abcd"]
    fair = Simulation(FairQueue(4096), loads, 32).run(200)
    fifo = Simulation(FifoQueue(4096), loads, 32).run(200)
    assert fair.num_tokens / fifo.num_tokens >= 0.98
