"""The autoscaling benchmark: its fluid queue against what can be counted by hand, its traces' absence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from benchmarks.autoscaling import A100, H100, cheapest
from benchmarks.autoscaling.bounds import best_lagging, foreseen
from benchmarks.autoscaling.fluid import Outcome, World, attainment, simulate
from benchmarks.autoscaling.policies import Headrace, Knative, Oracle, RayServe, Static
from benchmarks.autoscaling.traces import VARIABLE, Trace, azure_code, folder
from benchmarks.report import Skipped


def steady(num_seconds: int, replicas: float) -> World:
    """A trace that keeps so many replicas busy."""
    ones = np.ones(num_seconds)
    one = World(Trace("one", ones, 1000 * ones, 200 * ones), H100, 2)
    rate = replicas / one.capacity.mean_request_s
    return World(Trace("steady", rate * ones, rate * 1000 * ones, rate * 200 * ones), H100, 2)


def test_work_of_a_steady_trace_is_the_replicas_it_keeps_busy() -> None:
    assert steady(10, 3.0).work() == pytest.approx(3.0 * np.ones(10))


def test_enough_replicas_keep_every_request_within_the_slo_and_too_few_do_not() -> None:
    world = steady(600, 3.0)
    enough, too_few = simulate(world, Static(3, "3")), simulate(world, Static(2, "2"))
    assert (enough.attainment, enough.replica_hours) == (1.0, pytest.approx(0.5))
    assert too_few.attainment < 0.02


def test_a_wait_is_counted_to_the_half_second() -> None:
    world = steady(100, 1.0)
    work = np.zeros(100)
    work[10] = 1.0
    late = int(world.slack_s + 2)
    capacity = np.ones(100)
    capacity[10 : 10 + late] = 0.0
    requests = np.zeros(100)
    requests[[10, 50]] = 1.0
    world.trace = Trace("two", requests, requests, requests)
    work[50] = 1.0
    assert attainment(world, work, capacity) == 0.5


@pytest.mark.slow
def test_the_real_scaler_follows_a_step_in_the_fluid_queue() -> None:
    low, high = steady(600, 2.0).trace, steady(600, 6.0).trace
    trace = Trace(
        "step",
        np.concatenate([low.requests, high.requests]),
        np.concatenate([low.prompt_tokens, high.prompt_tokens]),
        np.concatenate([low.output_tokens, high.output_tokens]),
    )
    world = World(trace, H100, 2)
    policy = Headrace(world, 0.99)
    outcome = simulate(world, policy)
    assert 7 <= policy.decision.count <= 13, "a step that was late teaches room for another"
    assert outcome.attainment > 0.8
    assert outcome.num_changes <= 12
    oracle = simulate(world, Oracle(world, 1.0), is_lagging=False)
    assert oracle.attainment == 1.0
    assert oracle.replica_hours < outcome.replica_hours


@pytest.mark.slow
@pytest.mark.parametrize("peer", [Knative, RayServe])
def test_the_peers_formulas_settle_where_their_target_says(peer: type[Knative] | type[RayServe]) -> None:
    world = steady(1800, 3.0)
    count = 0
    for candidate in range(3, 60):  # the fixed point: as many as their own requests ask for
        if world.in_flight(0, 3.0, candidate) / candidate <= 0.2 * world.capacity.max_batch:
            count = candidate
            break
    outcome = simulate(world, peer(world, 0.2))
    assert outcome.attainment == 1.0
    assert outcome.mean_ready == pytest.approx(count, rel=0.35)


def test_the_cheapest_that_reaches_a_level_is_chosen() -> None:
    outcomes = [
        Outcome("a", "x", 10.0, 0.99, 0, 1.0),
        Outcome("a", "y", 8.0, 0.98, 0, 1.0),
        Outcome("b", "z", 1.0, 1.0, 0, 1.0),
    ]
    best = cheapest(outcomes, "a", 0.985)
    assert best is not None
    assert best.setting == "x"
    assert cheapest(outcomes, "a", 0.999) is None


def test_without_the_traces_it_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(Skipped, match=VARIABLE):
        folder()
    with pytest.raises(Skipped, match="is not there"):
        azure_code(tmp_path)


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder with traces")
def test_azures_trace_is_read_whole() -> None:
    trace = azure_code(folder())
    assert trace.requests.sum() == 8819
    assert World(trace, A100, 2).work().sum() > 0


def test_bounds_know_the_trace_and_pay_for_starts() -> None:
    steps = np.concatenate([np.full(300, 2.0), np.full(300, 6.0)])
    one = steady(600, 1.0).trace
    trace = Trace("step", one.requests * steps, one.prompt_tokens * steps, one.output_tokens * steps)
    world = World(trace, H100, 2)
    ahead, behind = foreseen(world), best_lagging(world)
    assert ahead is not None
    assert behind is not None
    least_hours = (2 * 300 + 6 * 300 + 4 * 48) / 3600
    assert least_hours * 0.98 <= ahead.replica_hours <= 1.1 * least_hours
    assert behind.replica_hours > 1.2 * ahead.replica_hours, "it must have the room before it needs it"
