"""What some worlds have beside the basis of their scenario: each part drawn with a source of its own.

Owns these draws, so that a seed that does not have a part keeps its history when the part changes. Must not
know the world in which it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from random import Random
from typing import Literal

from headrace.api.endpoint_config import CustomMetric
from headrace.api.node_config import GatewayPlacement
from headrace.fabric.host_link import LOST_AFTER_S
from headrace.sim.scenario import ENDING_NOTHING, Fault, Scenario, draw_basis

Part = Literal["gateway nodes", "cut off", "end", "metrics"]
CUT_OFF_RATIO = 0.5
"""Of the seeds with gateways on machines of their own, cut some of those off."""
LONGEST_CUT_S = LOST_AFTER_S - 1.0
END_RATIO = 0.15
METRICS_RATIO = 0.15
NODES_RATIO = 0.2
"""Of the seeds, have their gateways on machines of their own."""


def draw(seed: int, hours: float = 0.0, parts: Collection[Part] | None = None) -> Scenario:
    """Return the scenario of a seed. hours: how long it goes on, 0: some minutes. parts: those that it may
    have; None: all."""
    scenario = draw_basis(seed, hours)
    for part, add in PARTS.items():
        if parts is None or part in parts:
            random = Random(f"{part} {seed}")  # noqa: S311, not a secret
            scenario = add(random, scenario)
    return scenario


def _with_nodes(random: Random, scenario: Scenario) -> Scenario:
    """Let gateways be on machines of their own, which are lost and drained."""
    if random.random() >= NODES_RATIO:
        return scenario
    config, ends_s = scenario.config, scenario.ends_s
    gateway = config.gateway.model_copy(update={"placement": GatewayPlacement()})
    num_nodes = gateway.count + random.choice((0, 0, 1))
    faults = [
        Fault(
            random.uniform(0.15, 1.0) * ends_s,
            "gateway lost",
            random.random(),
            random.choice((0.0, 5.0, 20.0, 60.0)) * random.uniform(0.5, 1.5),
            random.random(),
        )
        for _ in range(random.choice((0, 1, 2, 4)))
    ]
    faults += [
        Fault(
            random.uniform(0.15, 0.9) * ends_s,
            "gateway drained",
            random.random(),
            random.choice((3.0, 15.0, 40.0)) * random.uniform(0.5, 1.5),
            random.random(),
        )
        for _ in range(random.choice((0, 0, 1, 2)))
    ]
    others = () if random.random() < 0.5 else scenario.faults  # alone, they cut nobody else's streams
    return replace(
        scenario,
        config=config.model_copy(update={"gateway": gateway}),
        faults=tuple(sorted((*others, *faults), key=lambda fault: fault.at_s)),
        node_skews=tuple(random.uniform(-1e-3, 1e-3) for _ in range(num_nodes)),
    )


def _with_cuts(random: Random, scenario: Scenario) -> Scenario:
    """Let machines of gateways be cut off, for less time than has them given up."""
    if not scenario.node_skews or random.random() >= CUT_OFF_RATIO:
        return scenario
    cuts = [
        Fault(
            random.uniform(0.15, 1.0) * scenario.ends_s,
            "gateway cut off",
            random.random(),
            LONGEST_CUT_S * random.choice((0.05, 0.2, 0.6, 1.0)) * random.uniform(0.5, 1.0),
        )
        for _ in range(random.choice((1, 3, 8)))
    ]
    others = () if random.random() < 0.4 else scenario.faults  # alone, they cut nobody else's streams
    return replace(scenario, faults=tuple(sorted((*others, *cuts), key=lambda fault: fault.at_s)))


def _with_end(random: Random, scenario: Scenario) -> Scenario:
    """Let the whole system be told to end at some moment, also in the middle of faults."""
    if random.random() >= END_RATIO:
        return scenario
    end = Fault(random.uniform(0.02, 1.0) * scenario.ends_s, "system ended", 0.0, 0.0, random.random())
    faults = scenario.faults
    if random.random() < 0.5:  # only with what leaves streams their grace
        faults = tuple(fault for fault in faults if fault.kind in ENDING_NOTHING)
    return replace(scenario, faults=tuple(sorted((*faults, end), key=lambda fault: fault.at_s)))


def _with_metrics(random: Random, scenario: Scenario) -> Scenario:
    """Let endpoints have custom metrics, which say this and that."""
    if random.random() >= METRICS_RATIO:
        return scenario
    endpoints = {}
    for name, endpoint in scenario.config.endpoints.items():
        sources = random.choice(
            ([f"http://metrics/{name}"], [f"/{name}.prom"], [f"http://{name}", f"/{name}"])
        )
        metrics = [
            CustomMetric(
                name=f"open_jobs_{number}",
                source=source,
                per_replica=random.choice((0.5, 10.0, 1e6)),
                max_age_s=random.choice((8.0, 40.0)),
            )
            for number, source in enumerate(sources)
        ]
        scaling = endpoint.scaling.model_copy(update={"metrics": metrics})
        endpoints[name] = endpoint.model_copy(update={"scaling": scaling})
    faults = [
        Fault(
            random.uniform(0.0, 1.0) * scenario.ends_s, "metric said", random.random(), 0.0, random.random()
        )
        for _ in range(random.choice((1, 4, 12)))
    ]
    return replace(
        scenario,
        config=scenario.config.model_copy(update={"endpoints": endpoints}),
        faults=tuple(sorted((*scenario.faults, *faults), key=lambda fault: fault.at_s)),
    )


PARTS: Mapping[Part, Callable[[Random, Scenario], Scenario]] = {
    "gateway nodes": _with_nodes,
    "cut off": _with_cuts,
    "end": _with_end,
    "metrics": _with_metrics,
}
"""In the order in which they are drawn: those that come later see what those before them have drawn."""
