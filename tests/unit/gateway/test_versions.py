"""What a router counts of demand and of versions: each request once, whoever speaks of it first."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from headrace.api.messages import (
    EndpointDemand,
    EndpointRule,
    FinishedRequest,
    LoadReport,
    TenantRule,
    TerminalState,
    VersionDemand,
)
from headrace.gateway.arrivals import Arrival
from headrace.gateway.dispatcher import Dispatcher
from headrace.gateway.flights import LOG_GRACE_S, ORPHAN_LIMIT_S
from headrace.gateway.replicas import ReplicaTable
from headrace.gateway.versions import MAX_VERSIONS, VersionBook
from headrace.policy.prompt import PromptHead
from headrace.policy.traffic import choose_version

RULE = EndpointRule("chat", "m", 8, 10.0, ttft_s=0.5, itl_s=0.05)
OLD, NEW = "old", "new"


class World:
    """One dispatcher with replicas of two versions."""

    def __init__(self, tenants: tuple[TenantRule, ...] = ()) -> None:
        self.table = ReplicaTable()
        self.dispatcher = Dispatcher([RULE], self.table, tenants=tenants)
        self.sequence = 0

    def report(self, generation: str, *finished: FinishedRequest, max_open: int = 2) -> None:
        self.sequence += 1
        report = LoadReport(
            replica_id=f"chat-{generation}", endpoint="chat", model="m", address="127.0.0.1:9000", pid=1,
            sequence=self.sequence, lease_s=60.0, state="ready", max_open=max_open, generation=generation,
            finished=list(finished),
        )  # fmt: skip
        replica = self.table.observe(report, self, 0.0)
        assert replica is not None
        replica.is_serving = True
        self.dispatcher.take_report(report, replica, 0.0)
        self.dispatcher.pump("chat", 0.0)

    def arrive(self, request_id: str, num_bytes: int = 400, tenant: str = "") -> None:
        prompt = PromptHead(num_bytes=num_bytes)
        arrival = Arrival(request_id, "chat", lambda decision: None, self, None, tenant=tenant, prompt=prompt)
        self.dispatcher.arrive(arrival, 0.0)
        self.dispatcher.check_integrity()

    def complete(self, request_id: str, state: TerminalState = TerminalState.FINISHED) -> None:
        self.dispatcher.complete(request_id, "chat", state)
        self.dispatcher.check_integrity()

    @property
    def demand(self) -> EndpointDemand:
        return self.dispatcher.demand(0.0)[0]

    @property
    def versions(self) -> dict[str, VersionDemand]:
        return {version.generation: version for version in self.dispatcher.version_demands()}


def ended(request_id: str, state: TerminalState = TerminalState.FINISHED, **changes: Any) -> FinishedRequest:
    values: dict[str, Any] = {
        "num_prompt_tokens": 100, "num_cached_tokens": 60, "num_output_tokens": 11, "ttft_s": 0.2,
        "total_s": 0.4, "engine_s": 0.03,
    }  # fmt: skip
    return FinishedRequest(request_id, state, "stop", "", **{**values, **changes})


def test_what_arrives_counts_at_once_and_what_was_measured_when_it_ends_once() -> None:
    world = World()
    world.arrive("a")
    assert (world.demand.arrived_prompt_tokens, world.demand.held_prompt_tokens) == (100, 100)
    world.report(OLD)
    assert (world.demand.arrived_prompt_tokens, world.demand.held_prompt_tokens) == (100, 0)
    world.report(OLD, ended("a"))
    world.complete("a")
    world.report(OLD, ended("a"))
    demand = world.demand
    tokens = (demand.prompt_tokens, demand.cached_tokens, demand.output_tokens)
    assert (demand.measured, *tokens, demand.engine_s) == (1, 100, 60, 11, 0.03)


def test_the_same_is_counted_when_the_log_speaks_first() -> None:
    world = World()
    world.report(OLD)
    world.arrive("a")
    world.complete("a")
    world.report(OLD, ended("a"))
    world.report(OLD, ended("a"))
    assert (world.demand.output_tokens, world.versions[OLD].finished) == (11, 1)


def test_another_gateways_requests_are_counted_by_that_gateway() -> None:
    world = World()
    world.report(OLD, ended("hr-g2-1"))
    assert (world.demand.output_tokens, world.versions) == (0, {})


def test_a_request_that_haproxy_served_alone_counts_when_its_front_tells_of_it() -> None:
    world = World()
    world.report(OLD)
    world.complete("a")
    assert (world.demand.arrived, world.demand.arrived_prompt_tokens) == (1, 0)
    world.report(OLD, ended("a"))
    assert (world.demand.arrived_prompt_tokens, world.demand.output_tokens) == (100, 11)


def test_requests_over_their_tenants_limits_are_no_demand() -> None:
    world = World((TenantRule("t", requests_per_minute=1),))
    world.arrive("a", tenant="t")
    world.arrive("b", tenant="t")
    demand = world.demand
    assert (demand.arrived, demand.refused, demand.over_limits) == (2, 1, 1)
    assert demand.arrived_prompt_tokens == 100


def test_requests_that_found_the_queue_full_are_demand() -> None:
    world = World()
    for number in range(RULE.max_queue + 1):
        world.arrive(str(number))
    demand = world.demand
    assert (demand.refused, demand.over_limits) == (1, 0)
    assert demand.arrived_prompt_tokens == 100 * (RULE.max_queue + 1)
    assert demand.held_prompt_tokens == 100 * RULE.max_queue


@pytest.mark.parametrize("way", ["client", "owner", "limit", "removed"])
def test_whatever_ends_the_waiting_held_tokens_return_to_zero(way: str) -> None:
    world = World()
    world.arrive("a")
    if way == "client":
        world.dispatcher.client_left("a", 0.0)
    elif way == "owner":
        world.dispatcher.owner_lost(world, 0.0)
    elif way == "limit":
        world.dispatcher.tick(RULE.max_wait_s + 1)
    else:
        world.dispatcher.set_rules([EndpointRule("other", "m", 8, 10.0)])
    world.dispatcher.check_integrity()
    assert sum(demand.held_prompt_tokens for demand in world.dispatcher.demand(0.0)) == 0


@pytest.mark.parametrize("way", ["client", "clients", "owner"])
def test_when_the_first_in_turn_leaves_the_next_one_is_bound_at_once(way: str) -> None:
    """While versions change, who is first waits for its own version; behind it may be one with room."""
    world = World()
    rule = msgspec.structs.replace(RULE, traffic={OLD: 0.5, NEW: 0.5})
    world.dispatcher.set_rules([rule])
    world.report(OLD, max_open=1)
    world.report(NEW, max_open=1)
    ids = [str(number) for number in range(100)]
    old = [each for each in ids if choose_version(each, rule.traffic) == OLD]
    new = [each for each in ids if choose_version(each, rule.traffic) == NEW]
    bound: list[str] = []
    for request_id, owner in ((old[0], "x"), (old[1], "first"), (new[0], "second")):
        arrival = Arrival(request_id, "chat", lambda decision, i=request_id: bound.append(i), owner, owner)  # type: ignore[misc]
        world.dispatcher.arrive(arrival, 0.0)
    assert bound == [old[0]]
    if way == "client":
        world.dispatcher.client_left(old[1], 0.0)
    elif way == "clients":
        world.dispatcher.clients_left({"first"}, 0.0)
    else:
        world.dispatcher.owner_lost("first", 0.0)
    assert bound[-1] == new[0]
    world.dispatcher.check_integrity()


def test_the_slot_of_an_abandoned_request_is_given_to_the_next_at_once() -> None:
    """It was bound while its client waited in the relay, and left."""
    world = World()
    world.report(OLD, max_open=1)
    bound: list[str] = []
    for request_id in ("a", "b"):
        arrival = Arrival(request_id, "chat", lambda decision, i=request_id: bound.append(i), world, None)  # type: ignore[misc]
        world.dispatcher.arrive(arrival, 0.0)
    assert bound == ["a"]
    world.dispatcher.passes.abandon("a", 0.0)
    assert bound == ["a", "b"]
    world.dispatcher.check_integrity()


def test_one_that_failed_before_its_first_token_and_is_never_heard_of_again_is_given_up() -> None:
    world = World()
    world.report(OLD)
    world.arrive("a")
    world.report(OLD, ended("a", TerminalState.FAILED, num_output_tokens=0))
    world.dispatcher.tick(ORPHAN_LIMIT_S + 1.0)
    demand = world.demand
    assert (demand.num_in_flight, demand.failed) == (0, 1)
    world.dispatcher.check_integrity()


def test_a_request_that_failed_first_and_was_answered_elsewhere_finished() -> None:
    world = World()
    world.report(OLD)
    world.arrive("a")
    world.report(OLD, ended("a", TerminalState.FAILED, num_output_tokens=0))
    world.dispatcher.tick(LOG_GRACE_S + 1.0)
    assert world.demand.num_in_flight == 1, "only the log knows whether it lives on elsewhere"
    world.report(NEW, ended("a"))
    world.complete("a")
    demand = world.demand
    assert (demand.finished, demand.failed) == (1, 0)


def test_each_version_has_its_own_ends_waits_and_gaps() -> None:
    world = World()
    world.report(OLD)
    world.arrive("fast")
    world.arrive("slow")
    world.report(OLD, ended("fast"), ended("slow", ttft_s=0.6, total_s=1.6))
    world.report(OLD, max_open=0)
    world.report(NEW)
    world.arrive("broken")
    world.report(NEW, ended("broken", TerminalState.FAILED, num_output_tokens=1))
    world.complete("broken")  # the log cannot tell that the front broke it off
    old, new = world.versions[OLD], world.versions[NEW]
    assert (old.finished, old.failed, old.slow_ttft, old.slow_itl) == (2, 0, 1, 1)
    assert (old.ttft_s, old.itl_s) == pytest.approx((0.8, 0.02 + 0.1))
    assert (new.finished, new.failed) == (0, 1)


def test_a_replica_that_dies_without_a_word_counts_against_its_version_once() -> None:
    world = World()
    world.report(NEW)
    world.arrive("a")
    world.complete("a", TerminalState.FAILED)
    world.report(NEW, ended("a", TerminalState.FAILED))
    assert (world.versions[NEW].failed, world.versions[NEW].finished) == (1, 0)


@pytest.mark.parametrize("state", [TerminalState.ABORTED, TerminalState.REFUSED])
def test_clients_that_leave_and_bad_requests_say_nothing_of_a_version(state: TerminalState) -> None:
    world = World()
    world.report(NEW)
    world.arrive("a")
    world.report(NEW, ended("a", state, num_output_tokens=0))
    world.complete("a", state)
    assert world.versions == {}


def test_generations_are_remembered_up_to_a_bound_the_stalest_goes() -> None:
    book = VersionBook()
    for number in range(MAX_VERSIONS):
        book.count_failure(str(number))
    book.count_failure("0")
    book.count_failure("one more")
    names = {demand.generation for demand in book.demands("chat")}
    assert len(names) == MAX_VERSIONS
    assert "1" not in names
    assert {"0", "one more"} <= names
