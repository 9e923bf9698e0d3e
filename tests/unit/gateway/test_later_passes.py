"""Requests that the relay sends again: one arrival, one charge, one end, in whatever order words come."""

from __future__ import annotations

import pytest
from tests.unit.gateway.test_dispatcher import CHAT, World

from headrace.api.messages import EndpointRule, FinishedRequest, LoadReport, TerminalState
from headrace.gateway.arrivals import Bound, Refused
from headrace.gateway.flights import ORPHAN_LIMIT_S


def refused_by(world: World, replica_id: str, request_id: str = "a", **more: object) -> None:
    """A front's report: it refused the request."""
    word = FinishedRequest(request_id, TerminalState.REFUSED, "refused", "", 0, 0, 0, 0.0, 0.0)
    report = LoadReport(
        replica_id, "chat", "m", "127.0.0.1:9000", 1, 10_000, 60.0, "draining", finished=[word]
    )
    world.dispatcher.take_report(report, world.table.replicas.get(replica_id), world.now_s)


def parked(world: World) -> None:
    """A request that was held, waits in the relay, and came for its decision."""
    world.arrive("a")
    world.dispatcher.passes.own("a", None)
    world.dispatcher.passes.own("a", "connection", "2")


@pytest.mark.parametrize("num_refusals", [1, 2, 3])
def test_whoever_refuses_a_parked_request_it_is_bound_again_counted_and_charged_once(
    num_refusals: int,
) -> None:
    world = World()
    parked(world)
    world.report("chat-0", max_open=1)
    (endpoint,) = world.dispatcher.endpoints.values()
    charged = endpoint.queue.counter("")
    assert charged > 0
    for number in range(num_refusals):
        world.report(f"chat-{number}", state="draining")
        refused_by(world, f"chat-{number}")
        world.dispatcher.passes.refused("a", str(number + 2), world.now_s)
        assert world.counts() == {"arrived": 1, "num_in_flight": 1}
        assert world.table.replicas[f"chat-{number}"].num_in_flight == 0
        world.report(f"chat-{number + 1}", max_open=1)
        assert world.come_again("a", str(number + 3)) == [Bound(f"chat-{number + 1}")]
        assert world.table.replicas[f"chat-{number + 1}"].num_in_flight == 1
        assert endpoint.queue.counter("") == pytest.approx(charged)
        world.dispatcher.check_integrity()
    world.complete("a")
    world.dispatcher.passes.first_ended("a", world.now_s)
    assert world.counts() == {"arrived": 1, "finished": 1}


def test_without_a_replica_it_is_held_again_before_the_others_and_beyond_a_full_queue() -> None:
    world = World((EndpointRule("chat", "m", 1, 10.0),))
    parked(world)
    world.report(max_open=1)
    world.report(state="draining")
    world.now_s += 4.0
    world.arrive("b")
    world.dispatcher.passes.refused("a", "2", world.now_s)
    again = world.come_again("a", "3")
    assert world.counts() == {"arrived": 2, "num_held": 2}
    world.report("chat-2", max_open=1)
    assert again == [Bound("chat-2")]
    assert world.answers["b"] == []


def test_its_waiting_is_limited_from_its_arrival() -> None:
    world = World()
    parked(world)
    world.report()
    world.report(state="draining")
    world.pass_time(CHAT.max_wait_s - 1)
    world.dispatcher.passes.refused("a", "2", world.now_s)
    again = world.come_again("a", "3")
    world.pass_time(1.0)
    (answer,) = again
    assert isinstance(answer, Refused)
    assert "10 s" in answer.message
    assert world.counts() == {"arrived": 1, "refused": 1}
    assert world.dispatcher.endpoints["chat"].queue.counter("") == 0.0


def test_late_words_on_earlier_passes_change_nothing() -> None:
    world = World()
    parked(world)
    world.report(max_open=1)
    world.report(state="draining")
    world.report("chat-2", max_open=1)
    assert world.come_again("a", "3") == [
        Bound("chat-2")
    ]  # faster than HAProxy's line and the front's report
    world.dispatcher.passes.refused("a", "2", world.now_s)
    refused_by(world, "chat-1")
    assert world.table.replicas["chat-2"].num_in_flight == 1
    world.dispatcher.passes.first_ended("a", world.now_s)
    assert world.counts() == {"arrived": 1, "num_in_flight": 1}, "its line is on its way"
    world.complete("a")
    assert world.counts() == {"arrived": 1, "finished": 1}


@pytest.mark.parametrize("is_line_first", [True, False])
def test_a_client_that_leaves_between_two_passes_ends_its_request(is_line_first: bool) -> None:
    world = World()
    parked(world)
    world.report()
    ends = [
        lambda: world.dispatcher.passes.refused("a", "2", world.now_s),
        lambda: world.dispatcher.passes.first_ended("a", world.now_s),
    ]
    for end in ends if is_line_first else reversed(ends):
        assert world.counts() == {"arrived": 1, "num_in_flight": 1}
        end()
    assert world.counts() == {"arrived": 1, "aborted": 1}
    (answer,) = world.come_again("a", "3")
    assert isinstance(answer, Refused)
    assert world.counts() == {"arrived": 1, "aborted": 1}


def test_a_pass_that_comes_after_its_clients_end_is_none() -> None:
    world = World()
    parked(world)
    world.report()
    world.dispatcher.passes.first_ended("a", world.now_s)
    (answer,) = world.come_again("a", "3")
    assert isinstance(answer, Refused)
    assert world.counts() == {"arrived": 1, "aborted": 1}


def test_a_router_that_was_started_since_counts_the_pass_that_it_sees() -> None:
    world = World()
    world.report()
    world.dispatcher.passes.refused("a", "2", world.now_s)
    assert world.come_again("a", "3") == [Bound("chat-1")]
    world.dispatcher.passes.refused("a", "3", world.now_s)
    assert world.come_again("a", "last") == [Bound("chat-1")]
    world.complete("a", TerminalState.REFUSED)
    assert world.counts() == {"arrived": 1, "refused": 1}


def test_a_call_that_haproxy_lost_is_answered_where_it_comes_again() -> None:
    world = World()
    parked(world)
    again = world.come_again("a", "3", owner="other")
    world.dispatcher.owner_lost("connection", world.now_s)
    world.report()
    assert again == [Bound("chat-1")]
    assert world.answers["a"] == []
    world.dispatcher.owner_lost("other", world.now_s)
    assert world.counts() == {"arrived": 1, "num_in_flight": 1}


def test_one_whose_endpoint_or_tenant_is_gone_ends_refused() -> None:
    world = World()
    parked(world)
    world.report()
    world.dispatcher.passes.refused("a", "2", world.now_s)
    world.dispatcher.set_rules([])
    (answer,) = world.come_again("a", "3")
    assert isinstance(answer, Refused)
    assert world.counts() == {"arrived": 1, "refused": 1}
    world.pass_time(2)
    assert world.dispatcher.demand(world.now_s) == []


def test_one_that_the_relay_lost_is_given_up() -> None:
    world = World()
    parked(world)
    world.report()
    world.dispatcher.passes.refused("a", "2", world.now_s)
    world.pass_time(ORPHAN_LIMIT_S + 1)
    assert world.counts() == {"arrived": 1, "failed": 1}
