"""Makes a failing scenario small: leaves out faults and clients while the same invariant still fails.

Owns the search and its limit. A scenario without some of its parts is another history, so a part that is left
out may be found again by another way; what remains is small, not smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from headrace.sim.scenario import Scenario
from headrace.sim.world import Outcome, World

MAX_RUNS = 80
Part = TypeVar("Part")


class Shrinker:
    """One search."""

    def __init__(self, scenario: Scenario, outcome: Outcome, max_runs: int = MAX_RUNS) -> None:
        """outcome: of `scenario`, with the violation that is looked for."""
        assert outcome.violation is not None
        self.scenario = scenario
        self.outcome = outcome
        self.runs_left = max_runs
        self._wanted = (outcome.violation.number, outcome.violation.name)

    def run(self) -> Outcome:
        """Return the outcome of the smallest scenario that was found; `scenario` is that one."""
        while True:
            before = len(self.scenario.faults) + len(self.scenario.clients)
            self._drop(self.scenario.faults, lambda parts: replace(self.scenario, faults=parts))
            self._drop(self.scenario.clients, lambda parts: replace(self.scenario, clients=parts))
            if self.runs_left <= 0 or len(self.scenario.faults) + len(self.scenario.clients) == before:
                return self.outcome

    def _drop(self, parts: tuple[Part, ...], make: Callable[[tuple[Part, ...]], Scenario]) -> None:
        """Leave out ever smaller pieces."""
        size = max(1, len(parts) // 2)
        while parts and self.runs_left > 0:
            index = 0
            while index < len(parts) and self.runs_left > 0:
                fewer = parts[:index] + parts[index + size :]
                if self._still_fails(make(fewer)):
                    parts = fewer
                else:
                    index += size
            if size == 1:
                return
            size //= 2

    def _still_fails(self, scenario: Scenario) -> bool:
        self.runs_left -= 1
        outcome = World(scenario).run()
        violation = outcome.violation
        if violation is None or (violation.number, violation.name) != self._wanted:
            return False
        self.scenario, self.outcome = scenario, outcome
        return True


def describe(scenario: Scenario, outcome: Outcome) -> Sequence[str]:
    """Return the lines that a person needs: what failed, in which small history."""
    config = scenario.config
    lines = [
        f"seed {scenario.seed}: {outcome.violation}",
        f"  config: {config.gateway.count} gateways, tenants {list(config.tenants) or 'none'}",
    ]
    for name, endpoint in config.endpoints.items():
        replicas = endpoint.replicas
        lines.append(
            f"  endpoint {name}: {endpoint.engine}, replicas {replicas.min} to {replicas.max}, standby "
            f"{replicas.standby}, max_running {endpoint.native.max_running}, max_open {endpoint.max_open}, "
            f"drain_grace_s {endpoint.drain_grace_s:g}"
        )
    lines.append(f"  {len(scenario.faults)} faults and {len(scenario.clients)} clients are left:")
    lines += [f"    client {plan.number} at {plan.arrives_s:.3f} s" for plan in scenario.clients[:20]]
    lines.append("  history:")
    lines += [f"    {line}" for line in outcome.history[-60:]]
    return lines
