"""Which gateways leave drained nodes, when, and in what order their processes end."""

from __future__ import annotations

import pytest

from headrace.api.messages import NodeState, ProcessState
from headrace.control.gateway_departure import depart
from headrace.control.gateway_state import GatewayState
from headrace.control.node_drains import LEAVING_MARGIN_S, NO_DEADLINE_S, NodeDrains

NOW_S = 100.0
GRACE_S = 30.0


@pytest.fixture
def state() -> GatewayState:
    """Two gateways that serve, g1 on node a, g2 on node b."""
    state = GatewayState(["g1", "g2"])
    for gateway_id, node in (("g1", "a"), ("g2", "b")):
        for essential in state.pairs[gateway_id].processes:
            essential.on_start(0.0)
            state.on_started(ProcessState(essential.name, 7, True, node=node), "head")
        state.on_probe(gateway_id, True, 0.0)
    return state


def drained(*nodes: str, left_s: float = 60.0) -> NodeDrains:
    drains = NodeDrains()
    states = [NodeState(n, "10.0.0.1", is_draining=True, drain_deadline_s=1000.0 + left_s) for n in nodes]
    drains.note(states, NOW_S, 1000.0)
    return drains


def stopped(
    state: GatewayState, drains: NodeDrains, now_s: float = NOW_S, with_fronts: tuple[str, ...] = ()
) -> dict[str, float]:
    """What is stopped now, as the controller does it: within how many seconds, by name."""
    stops = depart(state.pairs.values(), drains, with_fronts, GRACE_S, now_s)
    for essential, _ in stops:
        essential.is_stopping = True
    return {essential.name: grace_s for essential, grace_s in stops}


def test_its_streams_have_all_the_time_of_the_node_while_another_gateway_serves(state: GatewayState) -> None:
    assert stopped(state, drained()) == {}
    drains = drained("a")
    assert stopped(state, drains) == {"haproxy-g1": 60.0 - LEAVING_MARGIN_S}
    assert stopped(state, drains) == {}, "it was told"
    assert state.pairs["g1"].leaving
    assert not state.pairs["g2"].leaving


def test_a_drain_without_a_deadline_gives_a_long_time(state: GatewayState) -> None:
    drains = NodeDrains()
    drains.note([NodeState("a", "10.0.0.1", is_draining=True)], NOW_S, 1000.0)
    assert stopped(state, drains) == {"haproxy-g1": NO_DEADLINE_S - LEAVING_MARGIN_S}


def test_of_several_that_go_away_one_serves_until_another_is_back(state: GatewayState) -> None:
    drains = drained("a", "b")
    assert list(stopped(state, drains)) == ["haproxy-g1"]
    state.on_probe("g1", True, NOW_S)  # its sockets may answer once more
    assert stopped(state, drains) == {}, "the other one would leave nobody"
    end_all(state, drains)
    for essential in state.pairs["g1"].processes:
        essential.on_start(NOW_S)
    assert stopped(state, drains) == {}, "it is started, and serves nobody yet"
    state.on_probe("g1", True, NOW_S)
    assert list(stopped(state, drains)) == ["haproxy-g2"]


def end_all(state: GatewayState, drains: NodeDrains) -> None:
    """Let g1 end to the last process."""
    state.on_ended("haproxy-g1", "exit code 0: ", NOW_S)
    assert set(stopped(state, drains)) == {"router-g1", "relay-g1"}
    for name in ("router-g1", "relay-g1"):
        state.on_ended(name, "exit code 0: ", NOW_S)
    assert stopped(state, drains) == {}


def test_one_alone_leaves_in_time_for_its_streams(state: GatewayState) -> None:
    state.on_probe("g2", False, NOW_S)
    drains = drained("a")
    last_s = NOW_S + 60.0 - GRACE_S - LEAVING_MARGIN_S
    assert stopped(state, drains, last_s - 0.5) == {}
    assert stopped(state, drains, last_s) == {"haproxy-g1": GRACE_S}


def test_durable_fronts_go_after_their_haproxy_and_before_the_router_to_which_they_report(
    state: GatewayState,
) -> None:
    drains = drained("a")
    stopped(state, drains, with_fronts=("g1", "g2"))
    assert state.left() == set(), "they have streams"
    state.on_ended("haproxy-g1", "exit code 0: ", NOW_S)
    assert state.left() == {"g1"}
    assert stopped(state, drains, with_fronts=("g1", "g2")) == {}
    assert set(stopped(state, drains, with_fronts=("g2",))) == {"router-g1", "relay-g1"}


def test_nothing_of_it_is_started_before_all_has_ended_and_then_all_at_once(state: GatewayState) -> None:
    drains = drained("a")
    stopped(state, drains)
    state.on_ended("haproxy-g1", "exit code 0: ", NOW_S)
    assert state.due(NOW_S + 60.0) == []
    assert set(stopped(state, drains)) == {"router-g1", "relay-g1"}
    state.on_ended("router-g1", "exit code 0: ", NOW_S)
    assert stopped(state, drains) == {}
    assert state.due(NOW_S + 60.0) == []
    state.on_ended("relay-g1", "exit code 0: ", NOW_S)
    assert stopped(state, drains) == {}
    assert [essential.name for essential in state.due(NOW_S)] == ["router-g1", "haproxy-g1", "relay-g1"]
    assert all(essential.failures == 0 for essential in state.due(NOW_S)), "nobody failed"
    for essential in state.due(NOW_S):
        essential.on_start(NOW_S)
    assert stopped(state, drains) == {}, "what starts is not on the drained node"


def test_one_whose_node_is_lost_meanwhile_starts_again(state: GatewayState) -> None:
    stopped(state, drained("a"))
    for essential in state.pairs["g1"].processes:
        state.on_ended(essential.name, "its node is gone", NOW_S)
    assert stopped(state, NodeDrains()) == {}
    assert len(state.due(NOW_S)) == 3
