"""The whole system is told to end: streams have their grace, all is gone in time, nothing is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
from tests.sim.outcomes import first_failure

from headrace.sim.draws import draw
from headrace.sim.scenario import Fault, FaultKind, Scenario
from headrace.sim.world import Outcome, World

SIGTERM, DOWN = 0.0, 1.0


def _calm_worlds(min_grace_s: float) -> Iterator[Scenario]:
    """Worlds without faults whose clients are patient."""
    for seed in range(1, 200):
        scenario = draw(seed, parts=())
        if all(e.drain_grace_s >= min_grace_s for e in scenario.config.endpoints.values()):
            clients = tuple(replace(plan, leaves_after_s=None) for plan in scenario.clients)
            yield replace(scenario, clients=clients, faults=())


def _ended(scenario: Scenario, how: float, *others: tuple[float, FaultKind, float]) -> Outcome:
    """Run a world that is told to end while streams are open. others: each so long after that, what, and for
    how long."""
    ends_s = scenario.clients[len(scenario.clients) // 2].arrives_s + 0.6
    faults = [Fault(ends_s, "system ended", 0.0, 0.0, how)]
    faults += [Fault(ends_s + after_s, kind, 0.0, duration_s) for after_s, kind, duration_s in others]
    world = World(replace(scenario, faults=tuple(faults), ends_s=max(scenario.ends_s, ends_s + 20.0)))
    outcome = world.run()
    assert world.ending.began_s > 0
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("how", [SIGTERM, DOWN])
def test_a_system_that_is_told_to_end_lets_its_streams_end(how: float) -> None:
    num_done = 0
    for scenario in islice(_calm_worlds(20.0), 3):
        outcome = _ended(scenario, how)
        assert outcome.violation is None, f"seed {scenario.seed}: {outcome.violation}"
        assert not outcome.requests["cut"], f"seed {scenario.seed}: {outcome.requests}"
        num_done += outcome.requests["done"]
    assert num_done > 10


@pytest.mark.slow
@pytest.mark.parametrize("how", [SIGTERM, DOWN])
@pytest.mark.parametrize("kind", ["controller killed", "controller paused"])
def test_a_controller_that_is_lost_while_the_system_ends_does_not_keep_it(
    how: float, kind: FaultKind
) -> None:
    for scenario in islice(_calm_worlds(2.0), 4):
        outcome = _ended(scenario, how, (0.05, kind, 12.0))
        assert outcome.violation is None, f"seed {scenario.seed}: {outcome.violation}"


@pytest.mark.slow
def test_a_system_that_cuts_its_streams_as_it_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.control.drain._may_serve", lambda slot: False)
    outcomes = (_ended(scenario, DOWN) for scenario in islice(_calm_worlds(20.0), 8))
    outcome = first_failure(outcomes, "a cut stream")
    assert outcome.violation is not None
    assert "ends its streams" in outcome.violation.name, outcome.violation


@pytest.mark.slow
def test_a_system_of_which_something_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "headrace.sim.supervisor.SupervisorProcess._stop_all", lambda self, is_alone=True: None
    )
    monkeypatch.setattr("headrace.sim.controller.LauncherEnd.stop", lambda self, name, grace_s: None)
    outcome = _ended(next(_calm_worlds(0.0)), DOWN)
    assert outcome.violation is not None
    assert "gone in time" in outcome.violation.name, outcome.violation
