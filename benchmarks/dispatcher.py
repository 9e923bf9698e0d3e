"""CPU time of fair queue, limits, charges and dispatcher per request, in one process without sockets.

Part of `python -m benchmarks fairness`. From the arrival over the queue to the log's and the front's word of
the end. Placement, reading prompts and load reports have costs of their own (`benchmarks router` has all).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import count

from headrace.api.messages import (
    EndpointRule,
    EngineLoad,
    FinishedRequest,
    LoadReport,
    TenantRule,
    TerminalState,
)
from headrace.gateway.dispatcher import Arrival, Bound, Dispatcher, Refused
from headrace.gateway.replicas import ReplicaTable
from headrace.policy.placement import LeastLoaded, Placement, ReplicaObservation
from headrace.policy.prompt import PromptHead

NUM_REPLICAS = 4
NO_ROOM = Placement(None, "no_room")


class FirstWithRoom(LeastLoaded):
    """A placer that costs next to nothing."""

    def place(self, replicas: Sequence[ReplicaObservation], prompt: PromptHead, now_s: float) -> Placement:
        for replica in replicas:
            if replica.num_in_flight < replica.max_open:
                return Placement(replica.replica_id, "least_loaded")
        return NO_ROOM


class DispatcherRig:
    """A dispatcher with replicas, and tenants with limits that have `num_held` requests held."""

    def __init__(self, num_tenants: int, num_held: int) -> None:
        rules = [
            TenantRule(
                f"t{number}",
                requests_per_minute=10**8,
                tokens_per_minute=10**10,
                max_concurrent=10**6,
                max_queued=10**6,
            )
            for number in range(num_tenants)
        ]
        self.table = ReplicaTable(gateway_id="g1")
        rule = EndpointRule("chat", "m", 100_000, 3600.0, "least_loaded")
        self.dispatcher = Dispatcher([rule], self.table, tenants=rules)
        self._tenants = random.Random(5).choices([each.name for each in rules], k=4096)
        self._ids = count()
        self._bound: list[tuple[str, str]] = []
        for _ in range(num_held + 64 * NUM_REPLICAS):
            self._arrive()
        self._report()
        self.dispatcher.endpoints["chat"].placer = FirstWithRoom()

    def _arrive(self) -> None:
        number = next(self._ids)
        request_id, tenant = f"hr-g1-{number}", self._tenants[number % 4096]

        def answer(decision: Bound | Refused) -> None:
            assert isinstance(decision, Bound), decision
            self._bound.append((request_id, tenant))

        prompt = PromptHead(num_bytes=2000, max_output_tokens=256)
        self.dispatcher.arrive(Arrival(request_id, "chat", answer, None, None, tenant, prompt), 0.0)

    def _report(self) -> None:
        """Let the replicas be there."""
        for number in range(NUM_REPLICAS):
            report = LoadReport(
                f"chat-{number}", "chat", "m", "127.0.0.1:9000", 1, 1, 60.0, "ready", max_open=64,
                engine=EngineLoad(prefill_token_s=1e-4, decode_token_s=1e-3),
            )  # fmt: skip
            replica = self.table.observe(report, self, 0.0)
            assert replica is not None
            replica.is_serving = True
            self.dispatcher.take_report(report, replica, 0.0)
            self.dispatcher.pump("chat", 0.0)

    def cpu_us_per_request(self, num_requests: int) -> float:
        """Let so many requests arrive and others end, by log and fronts; return µs of CPU for each."""
        start_s = time.process_time()
        for _ in range(num_requests // 8):
            for _ in range(8):
                self._arrive()
            ended, self._bound = self._bound[:8], self._bound[8:]
            for request_id, tenant in ended:
                self.dispatcher.complete(request_id, "chat", TerminalState.FINISHED)
                self.dispatcher.pump("chat", 0.0)
                finished = FinishedRequest(
                    request_id, TerminalState.FINISHED, "stop", tenant, 500, 0, 200, 0.1, 1.0
                )
                self.dispatcher.front_finished(finished, 0.0, "chat")
        elapsed_s = time.process_time() - start_s
        self.dispatcher.check_integrity()
        return 1e6 * elapsed_s / num_requests
