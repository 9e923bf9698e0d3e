"""Which version's replica a request is bound to while versions change, and when it goes elsewhere."""

from __future__ import annotations

import msgspec
from tests.unit.gateway.test_dispatcher import World

from headrace.api.messages import EndpointRule, TenantRule
from headrace.gateway.arrivals import Arrival, Bound
from headrace.gateway.dispatcher import Refused
from headrace.policy.traffic import choose_version

TWO_VERSIONS = EndpointRule("chat", "m", 3, 10.0, traffic={"new": 0.25, "old": 0.75})


def of_version(version: str, num: int, rule: EndpointRule = TWO_VERSIONS) -> list[str]:
    """Request ids whose turn is a version's."""
    ids = (f"{version}-{number}" for number in range(1000))
    return [i for i in ids if choose_version(i, rule.traffic) == version][:num]


def two_versions(rule: EndpointRule = TWO_VERSIONS) -> World:
    """chat-1 of the old version is full; chat-2 of the new one has room for two."""
    world = World((rule,))
    world.report("chat-1", generation="old", max_open=1)
    world.report("chat-2", generation="new", address="127.0.0.1:9001", pid=2, max_open=2)
    world.arrive(of_version("old", 1, rule)[0])
    return world


def test_while_a_version_is_rolled_out_each_gets_its_part() -> None:
    world = World((TWO_VERSIONS,))
    world.report("chat-1", generation="old", max_open=500)
    request_ids = [f"hr-g1-{number}" for number in range(400)]
    wanted = {i: choose_version(i, TWO_VERSIONS.traffic) for i in request_ids}

    def replica_of(request_id: str) -> str:
        world.arrive(request_id)
        bound = world.replica_of(request_id)
        world.complete(request_id)
        return bound

    assert {replica_of(i) for i in request_ids[:50]} == {"chat-1"}, "the new version has no replica yet"
    world.report("chat-2", generation="new", address="127.0.0.1:9001", pid=2, max_open=1)
    for request_id in request_ids[50:]:
        assert replica_of(request_id) == {"old": "chat-1", "new": "chat-2"}[wanted[request_id]]


def test_a_request_waits_for_its_own_version_for_a_bounded_time_and_then_goes_anywhere() -> None:
    world = two_versions()
    first, second, third = of_version("old", 3)
    world.arrive(second)
    world.now_s += 0.5
    world.arrive(third)
    world.dispatcher.tick(world.now_s)
    assert not world.answers[second], "the canary has room, but that is not its part"
    world.complete(first)
    world.dispatcher.pump("chat", world.now_s)
    assert world.replica_of(second) == "chat-1"
    world.now_s += 0.99
    world.dispatcher.tick(world.now_s)
    assert not world.answers[third]
    world.now_s += 0.02
    world.dispatcher.tick(world.now_s)
    assert world.replica_of(third) == "chat-2"
    world.dispatcher.check_integrity()


def test_with_an_slo_a_request_waits_for_its_version_a_quarter_of_it() -> None:
    rule = msgspec.structs.replace(TWO_VERSIONS, ttft_s=0.4)
    world = two_versions(rule)
    second = of_version("old", 2)[1]
    world.arrive(second)
    world.now_s += 0.11
    world.dispatcher.tick(world.now_s)
    assert world.replica_of(second) == "chat-2"


def test_no_request_is_refused_while_another_version_has_room() -> None:
    world = two_versions(msgspec.structs.replace(TWO_VERSIONS, max_queue=1))
    _, second, third, fourth, fifth = of_version("old", 5)
    world.arrive(second)
    world.arrive(third)
    assert world.replica_of(second) == "chat-2", "rather than that its place is missing"
    world.arrive(fourth)
    assert world.replica_of(third) == "chat-2"
    world.arrive(fifth)
    assert isinstance(world.answers[fifth][0], Refused), "both are full, and so is the queue"
    assert not world.answers[fourth]
    world.dispatcher.check_integrity()


def test_who_comes_before_one_that_waits_for_its_version_is_bound_at_once() -> None:
    world = two_versions()
    world.dispatcher.set_tenants([TenantRule(""), TenantRule("first", priority=0)], world.now_s)
    world.arrive(of_version("old", 2)[1])
    answers: list[object] = []
    arrival = Arrival(of_version("new", 1)[0], "chat", answers.append, None, None, tenant="first")
    assert not world.dispatcher.arrive(arrival, world.now_s), "it does not wait"
    assert isinstance(answers[0], Bound)
    assert answers[0].replica_id == "chat-2"
    world.dispatcher.check_integrity()
