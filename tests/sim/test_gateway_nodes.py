"""Gateways on machines of their own: lost, cut off, drained, there again; and breaks that are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from tests.sim.outcomes import first_failure

from headrace.api.node_config import GatewayPlacement
from headrace.control.gateway_state import GatewayState
from headrace.sim.cluster_supervisor import ClusterSupervisor, gateway_of_process
from headrace.sim.draws import LONGEST_CUT_S, draw
from headrace.sim.scenario import Fault, Scenario
from headrace.sim.world import Outcome, World


def _calm_worlds(num_gateways: int, num_nodes: int, *, durable: bool = False) -> Iterator[Scenario]:
    """Worlds without faults whose gateways are on machines of their own; nobody leaves, all come late."""
    for seed in range(1, 200):
        scenario = draw(seed, parts=())
        endpoints = scenario.config.endpoints.values()
        if any(endpoint.streams.durable != durable or not endpoint.drain_grace_s for endpoint in endpoints):
            continue
        placed = {"placement": GatewayPlacement(), "count": num_gateways}
        gateway = scenario.config.gateway.model_copy(update=placed)
        yield replace(
            scenario,
            config=scenario.config.model_copy(update={"gateway": gateway}),
            clients=tuple(
                replace(plan, arrives_s=plan.arrives_s + 8.0, leaves_after_s=None)
                for plan in scenario.clients
            ),
            faults=(),
            ends_s=scenario.ends_s + 8.0,
            node_skews=(1e-4,) * num_nodes,
        )


def _loss(scenario: Scenario, duration_s: float, pick: float = 0.0) -> tuple[Fault, ...]:
    """The loss of one machine, while streams are open."""
    return (Fault(scenario.clients[2].arrives_s + 0.7, "gateway lost", pick, duration_s, 0.3),)


@pytest.mark.parametrize(
    ("name", "gateway"),
    [
        ("router-g2", "g2"),
        ("haproxy-g1", "g1"),
        ("chat:g3-1", "g3"),
        ("chat-1", ""),
        ("controller", ""),
        ("gateway-g1", ""),
    ],
)
def test_a_process_is_of_the_gateway_that_its_name_says(name: str, gateway: str) -> None:
    assert gateway_of_process(name) == gateway


@pytest.mark.slow
def test_a_lost_machine_cuts_its_own_clients_alone_and_its_gateway_waits_until_it_is_back() -> None:
    num_cut = 0
    for scenario in islice(_calm_worlds(2, 2), 5):
        world = World(replace(scenario, faults=_loss(scenario, 20.0)))
        outcome = world.run()
        assert outcome.violation is None, f"seed {scenario.seed}: {outcome.violation}"
        assert world.nodes is not None
        [lost] = world.nodes.lost_s
        cut = [state for state in world.crowd.states.values() if state.outcome == "cut"]
        assert {state.gateway for state in cut} <= {lost}, f"seed {scenario.seed}"
        num_cut += len(cut)
        assert any("is back" in line for line in outcome.history), f"seed {scenario.seed}"
    assert num_cut > 0


@pytest.mark.slow
def test_durable_fronts_come_again_with_their_gateway_elsewhere() -> None:
    num_cut = 0
    for scenario in islice(_calm_worlds(2, 3, durable=True), 4):
        world = World(replace(scenario, faults=_loss(scenario, 200.0)))
        outcome = world.run()
        assert outcome.violation is None, f"seed {scenario.seed}: {outcome.violation}"
        assert world.nodes is not None
        [lost] = world.nodes.lost_s
        fronts = [front for front in world.all_durable if front.spec.gateway_id == lost]
        assert len({front.host.name for front in fronts}) == 2, f"seed {scenario.seed}: {fronts}"
        num_cut += outcome.requests["cut"]
    assert num_cut > 0


@pytest.mark.slow
def test_a_drained_gateway_leaves_without_a_cut_stream_and_starts_elsewhere() -> None:
    for scenario in islice(_calm_worlds(2, 3), 4):
        drain = Fault(scenario.clients[2].arrives_s + 0.5, "gateway drained", 0.0, 90.0)
        world = World(replace(scenario, faults=(drain,), ends_s=max(scenario.ends_s, drain.at_s + 100.0)))
        outcome = world.run()
        assert outcome.violation is None, f"seed {scenario.seed}: {outcome.violation}"
        assert not outcome.requests["cut"], f"seed {scenario.seed}: {outcome.requests}"
        routers = [router.host.name for router in world.all_routers if router.gateway == "g1"]
        assert len(set(routers)) == 2, f"seed {scenario.seed}: {routers}"


def _cut_off(scenario: Scenario) -> tuple[Fault, ...]:
    """A gateway that reaches nothing but its clients for a while, while streams are open."""
    moments = [client.arrives_s + 0.7 for client in scenario.clients[2:4]]
    return tuple(Fault(moment, "gateway cut off", 0.0, LONGEST_CUT_S) for moment in moments)


@pytest.mark.slow
@pytest.mark.parametrize("durable", [False, True])
def test_a_gateway_that_is_cut_off_pauses_its_streams_and_is_not_replaced(durable: bool) -> None:
    num_done = 0
    for scenario in islice(_calm_worlds(2, 3, durable=durable), 4):
        world = World(replace(scenario, faults=_cut_off(scenario)))
        outcome = world.run()
        assert outcome.violation is None, f"seed {scenario.seed}: {outcome.violation}"
        assert outcome.faults["gateway cut off"], f"seed {scenario.seed}"
        assert not outcome.requests["cut"], f"seed {scenario.seed}: {outcome.requests}"
        assert len(world.all_routers) == 2, f"seed {scenario.seed}: {world.all_routers}"
        num_done += outcome.requests["done"]
    assert num_done > 20


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lose_node", "cut_off_node"])
def test_a_break_that_cuts_streams_of_other_gateways_is_found(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real = getattr(ClusterSupervisor, what)

    def act(self: ClusterSupervisor, *arguments: Any) -> int:
        for name in [name for name in self.children if name.startswith("haproxy")]:
            self.children[name].kill()
        found: int = real(self, *arguments)
        return found

    monkeypatch.setattr(ClusterSupervisor, what, act)

    def run(scenario: Scenario) -> Outcome:
        faults = _loss(scenario, 20.0, pick=0.9) if what == "lose_node" else _cut_off(scenario)
        return World(replace(scenario, faults=faults)).run()

    outcome = first_failure(map(run, islice(_calm_worlds(2, 2), 12)), "a cut stream")
    assert outcome.violation is not None
    assert outcome.violation.number == 26, outcome.violation


@pytest.mark.slow
def test_a_gateway_that_never_comes_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = GatewayState.on_ended

    def on_ended(self: GatewayState, name: str, error: str, now_s: float) -> None:
        real(self, name, error, now_s)
        self.processes[name].due_s = float("inf") if "is gone" in error else self.processes[name].due_s

    monkeypatch.setattr(GatewayState, "on_ended", on_ended)
    scenario = next(_calm_worlds(2, 2))
    outcome = World(replace(scenario, faults=_loss(scenario, 5.0))).run()
    assert outcome.violation is not None
    assert outcome.violation.number == 11, outcome.violation
