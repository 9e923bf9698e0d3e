"""Several gateways that know nothing of each other but what fronts report: shares and limits hold.

Virtual time: one replica with a step-time engine, dispatchers that are told every end and every load, and
clients whose connections landed on this gateway or that one.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from headrace.api.messages import (
    EndpointRule,
    EngineLoad,
    FinishedRequest,
    LoadReport,
    TenantRule,
    TerminalState,
    gateway_of,
)
from headrace.gateway.dispatcher import Arrival, Bound, Dispatcher, Refused
from headrace.gateway.replicas import ReplicaTable
from headrace.policy.prompt import PromptHead

pytestmark = pytest.mark.slow
STEP_S = 0.01
REPORT_PERIOD_S = 0.05
MAX_OPEN = 24
PREFILL_TOKEN_S = 0.0001
DECODE_TOKEN_S = STEP_S / MAX_OPEN


@dataclass
class Client:
    """One connection: a request at a time, always over the same gateway."""

    tenant: str
    gateway: int
    output: tuple[int, int]


@dataclass
class Request:
    request_id: str
    client: Client
    num_output: int
    num_done: int = 0


@dataclass
class System:
    """One replica, its reports, and `num_gateways` dispatchers."""

    rules: list[TenantRule]
    num_gateways: int
    now_s: float = 0.0
    num_refused: Counter[str] = field(default_factory=Counter)
    work_s: Counter[str] = field(default_factory=Counter)
    num_tokens: Counter[str] = field(default_factory=Counter)
    most_open: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(11)
        self.tables = [ReplicaTable(gateway_id=f"g{number}") for number in range(self.num_gateways)]
        rule = EndpointRule("chat", "m", 4096, 1000.0, "least_loaded")
        self.dispatchers = [Dispatcher([rule], table, tenants=self.rules) for table in self.tables]
        self.open: dict[str, Request] = {}
        self.finished: list[FinishedRequest] = []
        self.sequence = 0
        self.num_sent = 0
        self.retries: list[tuple[float, Client]] = []
        self.report()

    def send(self, client: Client) -> None:
        self.num_sent += 1
        request_id = f"hr-g{client.gateway}-{self.num_sent}"
        request = Request(request_id, client, self.rng.randint(*client.output))

        def answer(decision: Bound | Refused) -> None:
            if isinstance(decision, Bound):
                self.open[request_id] = request
            else:
                self.num_refused[client.tenant] += 1
                self.retries.append((self.now_s + decision.retry_after_s, client))

        prompt = PromptHead(num_bytes=400, max_output_tokens=client.output[1])
        arrival = Arrival(request_id, "chat", answer, "spoe", None, client.tenant, prompt)
        self.dispatchers[client.gateway].arrive(arrival, self.now_s)

    def report(self) -> None:
        """Tell every gateway the same, and let each bind what it holds."""
        self.sequence += 1
        report = LoadReport(
            "chat-1", "chat", "m", "127.0.0.1:9000", 1, self.sequence, 3.0, "ready",
            num_open=len(self.open), max_open=MAX_OPEN, finished=self.finished,
            engine=EngineLoad(prefill_token_s=PREFILL_TOKEN_S, decode_token_s=DECODE_TOKEN_S),
            open_by_tenant=dict(Counter(each.client.tenant for each in self.open.values())),
            open_by_gateway=dict(Counter(gateway_of(each) for each in self.open)),
        )  # fmt: skip
        self.finished = []
        for number in self.rng.sample(range(self.num_gateways), self.num_gateways):
            table, dispatcher = self.tables[number], self.dispatchers[number]
            replica = table.observe(report, self, self.now_s)
            assert replica is not None
            replica.is_serving = True
            for finished in report.finished:
                if gateway_of(finished.request_id) == f"g{number}":
                    dispatcher.complete(finished.request_id, "chat", TerminalState.FINISHED)
            dispatcher.take_report(report, replica, self.now_s)
            dispatcher.pump("chat", self.now_s)

    def step(self) -> None:
        self.now_s += STEP_S
        ended = []
        for request in self.open.values():
            tenant = request.client.tenant
            self.work_s[tenant] += DECODE_TOKEN_S + (PREFILL_TOKEN_S * 100 if not request.num_done else 0)
            request.num_done += 1
            if request.num_done == request.num_output:
                ended.append(request)
        for request in ended:
            del self.open[request.request_id]
            tenant = request.client.tenant
            self.num_tokens[tenant] += 100 + request.num_output
            self.finished.append(
                FinishedRequest(
                    request.request_id,
                    TerminalState.FINISHED,
                    "stop",
                    tenant,
                    100,
                    0,
                    request.num_output,
                    0,
                    0,
                )
            )
        if ended or self.now_s % REPORT_PERIOD_S < STEP_S:
            self.report()
        for request in ended:
            self.send(request.client)
        due = [client for due_s, client in self.retries if due_s <= self.now_s]
        self.retries = [(due_s, client) for due_s, client in self.retries if due_s > self.now_s]
        for client in due:
            self.send(client)
        open_now = Counter(each.client.tenant for each in self.open.values())
        self.most_open |= open_now

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.step()
            for dispatcher in self.dispatchers:
                dispatcher.tick(self.now_s)
        for dispatcher in self.dispatchers:
            dispatcher.check_integrity()


def connect(system: System, tenant: str, num_clients: int, output: tuple[int, int] = (20, 100)) -> None:
    """Open connections; each lands on some gateway."""
    for _ in range(num_clients):
        system.send(Client(tenant, system.rng.randrange(system.num_gateways), output))


@pytest.mark.parametrize("num_gateways", [2, 4])
def test_shares_hold_across_gateways(num_gateways: int) -> None:
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    system = System([TenantRule(name, weight) for name, weight in weights.items()], num_gateways)
    connect(system, "one", 200)  # a flood, of the least weight
    connect(system, "two", 60, (100, 200))
    connect(system, "four", 80, (10, 30))
    system.run(30.0)
    shares = [system.work_s[name] / weight for name, weight in weights.items()]
    jain = sum(shares) ** 2 / (3 * sum(share**2 for share in shares))
    assert jain >= 0.98, dict(system.work_s)


@pytest.mark.parametrize(("num_gateways", "most_on_average"), [(1, 8.0), (2, 9.0), (4, 10.0)])
def test_requests_at_a_time_exceed_the_limit_only_by_what_one_report_period_hides(
    num_gateways: int, most_on_average: float
) -> None:
    limit = 8
    system = System([TenantRule("a", max_concurrent=limit), TenantRule("b")], num_gateways)
    connect(system, "a", 100)  # all at once: each gateway fills the limit before it hears of the others
    connect(system, "b", 20)
    system.run(3.0)
    assert limit <= system.most_open["a"] <= limit * num_gateways
    counts = []
    for _ in range(1000):
        system.run(STEP_S / 2)
        counts.append(sum(request.client.tenant == "a" for request in system.open.values()))
    assert limit - 1 <= sum(counts) / len(counts) <= most_on_average


@pytest.mark.parametrize("num_gateways", [1, 3])
def test_tokens_per_minute_hold_across_gateways_within_what_is_in_flight(num_gateways: int) -> None:
    limit = 30_000
    system = System([TenantRule("a", tokens_per_minute=limit), TenantRule("b")], num_gateways)
    connect(system, "a", 40)
    minutes = 2
    system.run(60.0 * minutes)
    most = max(110, 200) * MAX_OPEN  # what may be in flight elsewhere, unreported
    assert system.num_tokens["a"] <= limit * (minutes + 1) + (num_gateways - 1) * most
    assert system.num_tokens["a"] >= 0.9 * limit * minutes, "and no less than was granted"
    assert system.num_refused["a"] > 0
