"""Who of a gateway hangs: HAProxy by its silences, the others by time, and nobody because we stood still."""

from __future__ import annotations

import pytest

from headrace.api.messages import Demand, ProcessState, VersionDemand
from headrace.control.essentials import HUNG_AFTER_S, STOOD_STILL_S, Essential
from headrace.control.gateway_state import MAX_SILENCES, GatewayState


@pytest.fixture
def state() -> GatewayState:
    state = GatewayState(["g1", "g2"])
    for essential in state.processes.values():
        essential.on_start(0.0)
    return state


def names(found: list[Essential]) -> list[str]:
    return [essential.name for essential in found]


def test_a_haproxy_that_is_silent_twice_in_a_row_hangs(state: GatewayState) -> None:
    for _ in range(MAX_SILENCES):
        assert state.hung(1.0) == []
        state.on_probe("g2", False, 1.0, is_silent=True)
    assert names(state.hung(1.0)) == ["haproxy-g2"]
    state.pairs["g2"].haproxy.is_stopping = True
    assert state.hung(1.0) == [], "it is being killed"
    state.on_ended("haproxy-g2", "killed", 2.0)
    state.pairs["g2"].haproxy.on_start(2.0)
    assert state.hung(2.0) == [], "the next one has said nothing yet"


def test_a_haproxy_that_only_takes_no_probe_is_never_killed(state: GatewayState) -> None:
    state.on_probe("g1", False, 1.0, is_silent=True)
    for second in range(1, 8):
        state.on_probe("g1", False, float(second), is_silent=False)
        assert state.hung(float(second)) == []


def test_a_controller_that_stood_still_takes_nobody_for_hung(state: GatewayState) -> None:
    state.on_tick(0.0)
    state.on_tick(STOOD_STILL_S)
    late_s = 10 * HUNG_AFTER_S
    state.on_tick(late_s)
    assert state.hung(late_s) == []
    heard_s = state.pairs["g1"].router.heard_s
    now_s = late_s
    while now_s <= heard_s + HUNG_AFTER_S:
        state.on_tick(now_s)
        assert "router-g1" not in names(state.hung(now_s))
        now_s += 0.5
    state.on_tick(now_s)
    assert names(state.hung(now_s)) == ["router-g1", "relay-g1", "router-g2", "relay-g2"]


def on_node(state: GatewayState, gateway_id: str, node: str) -> None:
    for essential in state.pairs[gateway_id].processes:
        state.on_started(ProcessState(essential.name, 7, True, node=node), "head")


def test_nobody_is_judged_by_a_silence_that_may_be_the_networks(state: GatewayState) -> None:
    on_node(state, "g1", "head")
    on_node(state, "g2", "far")
    now_s = 0.0
    while now_s < 3 * HUNG_AFTER_S:
        now_s += 0.5
        state.on_tick(now_s)
        if now_s % 4 == 0:  # two limits of a probe
            state.on_probe("g2", False, now_s, is_silent=True)
        assert [name for name in names(state.hung(now_s)) if name.endswith("g2")] == []
    assert names(state.hung(now_s)) == ["router-g1", "relay-g1"]
    healed_s = now_s
    while now_s < healed_s + HUNG_AFTER_S:  # its relay is heard again, the others need not be so quick
        now_s += 0.5
        state.pairs["g2"].relay.heard_s = now_s
        state.on_tick(now_s)
        assert [name for name in names(state.hung(now_s)) if name.endswith("g2")] == []
    state.pairs["g2"].relay.heard_s = now_s + 0.5
    state.on_tick(now_s + 0.5)
    assert "router-g2" in names(state.hung(now_s + 0.5)), "its node is heard, and it says nothing"


def test_a_gateway_that_waits_for_a_node_has_no_requests_to_be_heard_of(state: GatewayState) -> None:
    assert not state.is_heard(1.0)
    for pair in state.pairs.values():
        for essential in pair.processes:
            state.on_waiting(essential.name, "waits for a node", 1.0)
    assert not state.is_heard(1.0), "nobody is heard"
    on_node(state, "g1", "far")
    state.on_demand(Demand("g1", 7, [], []), 1.0)
    assert state.is_heard(1.0)
    assert state.pairs["g2"].is_placeless
    on_node(state, "g2", "far")
    assert not state.is_heard(1.0)


def test_a_router_of_the_same_pid_on_another_node_is_an_earlier_one(state: GatewayState) -> None:
    state.on_started(ProcessState("router-g1", 7, True, node="b", node_address="10.0.0.2"), "a")
    state.on_demand(Demand("g1", 7, [], [], node_address="10.0.0.1"), 1.0)
    assert state.pairs["g1"].demand is None
    state.on_demand(Demand("g1", 7, [], [], node_address="10.0.0.2"), 1.0)
    assert state.pairs["g1"].demand is not None


def test_what_a_router_of_the_same_pid_on_another_node_counts_is_new(state: GatewayState) -> None:
    for address in ("10.0.0.1", "10.0.0.2"):
        count = VersionDemand("chat", "new", 5, 0)
        state.version_counts.observe(Demand("g1", 7, [], [], versions=[count], node_address=address))
    assert state.version_counts.of("chat", "new").finished == 10


def test_the_last_word_of_a_router_that_has_ended_is_not_the_next_ones(state: GatewayState) -> None:
    state.on_started(ProcessState("router-g1", 7, True), "")
    state.on_demand(Demand("g1", 7, [], []), 1.0)
    state.on_ended("router-g1", "killed", 2.0)
    state.on_demand(Demand("g1", 7, [], []), 2.0)
    assert state.pairs["g1"].demand is None
    state.pairs["g1"].router.on_start(2.0)
    state.on_demand(Demand("g1", 7, [], []), 2.0)
    assert state.pairs["g1"].demand is None, "it was sent before, and read after"
