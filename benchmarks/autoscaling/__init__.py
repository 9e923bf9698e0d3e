"""Policies of scaling over real traces: replica-hours against the share of requests within the SLO.

Every policy runs over the same fluid queue with several settings; each is compared by its cheapest setting
that reaches an attainment. Traces are in the folder that HEADRACE_TRACES names.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np

from benchmarks.autoscaling.bounds import best_lagging, foreseen
from benchmarks.autoscaling.fluid import Kind, Outcome, World, simulate
from benchmarks.autoscaling.policies import Headrace, Knative, Oracle, RayServe, Static
from benchmarks.autoscaling.traces import azure_code, folder, servegen
from benchmarks.report import Aim, Report, Table
from headrace.api.messages import StepModel

GPU_START_S, CPU_START_S = 60.0, 3.0
LEVELS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
AIM_LEVEL, AIM_RATIO = 0.99, 1.15
TARGETS = ((0.99, 60.0),)
"""slo.attainment_ratio and scaling.down_after_s."""
EAGER = ((0.99, 10.0), (0.99, 0.0), (0.999, 0.0))
"""Further settings where starts are short: scaling.down_after_s below its default."""
CONCURRENCY = (0.1, 0.2, 0.25, 0.3, 0.4)
UTILIZATIONS = (1.0, 1.1)
BOUNDS = {
    "foreseen": "a fleet that knows all that comes and pays for its starts",
    "best lagging": "the best that demand of a start ago and a margin can do, both chosen in hindsight,",
}
POLICIES = ("headrace", "Knative", "Ray Serve", "static")
# Step models fitted to the grids that aiconfigurator 0.12 computes for Llama-3.1-70B.
H100 = Kind(
    "Llama-3.1-70B on 8 H100",
    StepModel(a=9.93e-3, b=33.7e-6, q=1.99e-9, c=22.6e-6, d=1.53e-8),
    max_running=256,
    ttft_s=2.0,
    itl_s=0.05,
    start_s=GPU_START_S,
)
A100 = Kind(
    "Llama-3.1-70B on 4 A100",
    StepModel(a=27.7e-3, b=152e-6, q=3.2e-9, c=97.9e-6, d=5.34e-8),
    max_running=256,
    ttft_s=5.0,
    itl_s=0.1,
    start_s=GPU_START_S,
)
AZURE_TIMES = 8


def run(*, is_quick: bool) -> Report:
    """Run every policy over both traces with both start times. Raises Skipped without the traces."""
    path = folder()
    report = Report(
        "autoscaling",
        "Replica-hours against the share of requests within the SLO",
        "A fluid queue in steps of one second. What arrives are real traces; what a replica can do is "
        "computed with a step model; start times are log-normal with the p95 given. The policy of headrace "
        "is its real scaler, told what routers and replicas tell it. Knative and Ray Serve are their "
        "documented formulas with their default windows. The oracle knows the load of its next period and "
        "has no start time.",
    )
    days = 0.5 if is_quick else 7
    large = servegen(path, days)
    name = f"ServeGen m-large, {days:g} days"
    code, times = azure_code(path, AZURE_TIMES), f"each request {AZURE_TIMES} times"
    worlds = [
        (name, World(large, H100, 10)),
        (name, World(large, _fast(H100), 10)),
        (f"Azure code 2023, {times}", World(code, A100, 2)),
        (f"Azure code 2023, {times}", World(code, _fast(A100), 2)),
    ]
    for trace, world in worlds:
        title = f"{trace}: {world.kind.name}, starts within {world.kind.start_s:g} s (p95)"
        print(f"   {title}", file=sys.stderr, flush=True)
        _add(report, title, world)
    report.caveats += [
        "Requests are fluid: within a second they are served in their order, and each costs what the tokens "
        "of its second cost on average. A batch is as large as the SLO between tokens allows, so that only "
        "waiting breaks the SLO. Prefixes are not cached. Percentiles and the peak of demand are of its "
        "means per minute.",
        "The scaler learns from the beginning of each trace; fixed fleets are chosen in hindsight.",
        "ServeGen's requests are drawn: each client has as many in each ten minutes as were counted, apart "
        "by the distribution fitted to it.",
        "Draining takes no time, for all policies. The oracle changes its fleet every period, as no real "
        "one can, and knows bursts before they come.",
    ]
    return report


def _fast(kind: Kind) -> Kind:
    return replace(kind, start_s=CPU_START_S)


def _outcomes(world: World) -> Iterator[Outcome]:
    for utilization in UTILIZATIONS:
        yield simulate(world, Oracle(world, utilization), is_lagging=False)
    settings = [*TARGETS, *EAGER] if world.kind.start_s < EAGER[0][1] else TARGETS
    for attainment_ratio, down_after_s in settings:
        yield simulate(world, Headrace(world, attainment_ratio, down_after_s))
    for ratio in CONCURRENCY:
        yield simulate(world, Knative(world, ratio))
        yield simulate(world, RayServe(world, ratio))
    minutes = np.convolve(world.work(), np.ones(60) / 60, "valid")
    for percentile in (90, 95, 99):
        yield simulate(world, Static(math.ceil(np.percentile(minutes, percentile)), f"p{percentile:g}"))
    for times in (1, 1.5, 2.5, 4):
        name = f"{times:g} times the peak" if times > 1 else "peak"
        yield simulate(world, Static(math.ceil(times * minutes.max()), name))


def _add(report: Report, title: str, world: World) -> None:
    bounds = [each for each in (foreseen(world), best_lagging(world)) if each is not None]
    outcomes = [*_outcomes(world), *bounds]
    rows = [
        [
            each.policy,
            each.setting,
            f"{each.replica_hours:.1f}",
            f"{each.attainment:.2%}",
            str(each.num_changes),
        ]
        for each in outcomes
    ]
    headers = ("policy", "setting", "replica-hours", "within the SLO", "changes")
    report.tables.append(Table(title, headers, rows))
    rows = []
    for level in LEVELS:
        best = {name: cheapest(outcomes, name, level) for name in ("oracle", *POLICIES)}
        oracle = best["oracle"]
        cells = [_cell(best[name], oracle) for name in POLICIES]
        rows.append([f"{level:.1%}", _cell(oracle, None), *cells])
        if level == AIM_LEVEL:
            _aim(report, title, best)
            _say_bounds(report, title, best["oracle"], bounds)
    report.tables.append(
        Table(f"The cheapest at equal attainment. {title}", ("at least", "oracle", *POLICIES), rows)
    )
    report.data[title] = [asdict(each) for each in outcomes]


def _aim(report: Report, title: str, best: dict[str, Outcome | None]) -> None:
    own, oracle = best["headrace"], best["oracle"]
    if own is None or oracle is None:
        report.aims.append(Aim(title, f"{AIM_LEVEL:.0%} within the SLO", "not reached", False))
        return
    ratio = own.replica_hours / oracle.replica_hours
    others = [
        each.replica_hours for name, each in best.items() if each and name not in ("headrace", "oracle")
    ]
    is_least = all(own.replica_hours < hours for hours in others)
    aim = f"≤ {AIM_RATIO:g} times the oracle's hours at {AIM_LEVEL:.0%}, and fewer than every other"
    lowest = f"{min(others) / own.replica_hours:.2f} times headrace's" if others else "does not reach it"
    measured = f"{ratio:.2f} times; the cheapest other: {lowest}"
    report.aims.append(Aim(title, aim, measured, ratio <= AIM_RATIO and is_least))


def _say_bounds(report: Report, title: str, oracle: Outcome | None, bounds: list[Outcome]) -> None:
    """Say how near to the oracle a fleet that must start its replicas could come."""
    if oracle is None:
        return
    for each in bounds:
        ratio = each.replica_hours / oracle.replica_hours
        report.caveats.append(
            f"{title}: {BOUNDS[each.policy]} needs {ratio:.2f} times the oracle's hours at {AIM_LEVEL:.0%} "
            f"({each.setting})."
        )


def cheapest(outcomes: list[Outcome], policy: str, level: float) -> Outcome | None:
    """Return a policy's cheapest outcome that reaches an attainment; None if none does."""
    enough = [each for each in outcomes if each.policy == policy and each.attainment >= level]
    return min(enough, key=lambda each: each.replica_hours, default=None)


def _cell(outcome: Outcome | None, oracle: Outcome | None) -> str:
    if outcome is None:
        return "not reached"
    ratio = f" ({outcome.replica_hours / oracle.replica_hours:.2f}×)" if oracle is not None else ""
    return f"{outcome.replica_hours:.1f}{ratio}"
