"""Custom metrics: what each saying is worth to the product, and that fleets follow it to its end."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from headrace.api.config import Config
from headrace.api.endpoint_config import CustomMetric
from headrace.policy.scaling_metrics import MetricReading, replicas_asked
from headrace.sim.draws import draw
from headrace.sim.machine import Host
from headrace.sim.metric_sources import SAYINGS, MetricSources, MetricsReader, Saying
from headrace.sim.scenario import Fault, Scenario
from headrace.sim.timeline import Timeline
from headrace.sim.world import World

ADDRESS, FILE = "http://metrics/chat", "/chat.prom"
MAX_COUNT = 5


def _config(source: str) -> Config:
    metric = CustomMetric(name="open_jobs", source=source, per_replica=10.0, max_age_s=8.0)
    endpoint = {
        "model": "good-0",
        "engine": "simulated",
        "replicas": {"min": 0, "max": MAX_COUNT},
        "scaling": {"metrics": [metric], "down_after_s": 1.0, "idle_to_zero_s": 5.0},
        "drain_grace_s": 2.0,
    }
    gateway = {"bind": "127.0.0.1:8000"}
    return Config.model_validate({"endpoints": {"chat": endpoint}, "gateway": gateway, "state_dir": "state"})


def _said(at_s: float, saying: Saying, count: int) -> Fault:
    amount = (SAYINGS.index(saying) + (count - 0.5) / 6) / len(SAYINGS)
    return Fault(at_s, "metric said", 0.0, 0.0, amount)


def _calm_world(source: str, *faults: Fault) -> Scenario:
    scenario = draw(1, parts=())
    return replace(scenario, config=_config(source), clients=(), faults=faults, start_s=1.0, ends_s=40.0)


def _count(world: World) -> int:
    assert world.controller is not None
    assert world.controller.state is not None
    [desired] = world.controller.state.desired(world.controller.host.now_s())
    return desired.count


@pytest.mark.parametrize("source", [ADDRESS, FILE])
@pytest.mark.parametrize("saying", get_args(Saying))
def test_the_product_believes_what_a_source_asks_for_and_nothing_else(saying: Saying, source: str) -> None:
    timeline = Timeline(1)
    host = Host(timeline, "control", 0.0)
    config = _config(source)
    sources = MetricSources(config, host)
    reader = MetricsReader(host, sources)
    reader.want(config)
    for elapsed_s in (0.0, 20.0):
        if not elapsed_s:
            sources.say(_said(0.0, saying, 3))
        timeline.run_next(elapsed_s)
        reader.read_now()
        [reading] = reader.readings("chat")
        asked, why = replicas_asked(reading)
        [known] = sources.sources.values()
        assert known.saying == saying
        assert (asked or 0.0) == pytest.approx(known.asks(host.wall_s())), why
    assert sources.count_of(config.endpoints["chat"].scaling.metrics) == (
        0 if source == FILE else {"count": 3, "labels": 3, "many": 900}.get(saying, 0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("last", [saying for saying in get_args(Saying) if saying != "count"])
def test_a_fleet_rests_at_what_the_last_value_asks_for_or_without_one_at_its_minimum(last: Saying) -> None:
    world = World(_calm_world(ADDRESS, _said(5.0, "count", 3), _said(30.0, last, 2)))
    outcome = world.run()
    assert outcome.violation is None, outcome.violation
    assert any("StartReplica chat-3" in line for line in outcome.history)
    assert _count(world) == {"labels": 2, "many": MAX_COUNT}.get(last, 0)


@pytest.mark.slow
def test_a_file_that_is_not_written_any_more_asks_for_nothing() -> None:
    world = World(_calm_world(FILE, _said(20.0, "count", 4)))
    outcome = world.run()
    assert outcome.violation is None, outcome.violation
    assert any("StartReplica chat-4" in line for line in outcome.history)
    assert _count(world) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("source", "said"), [(FILE, "count"), (ADDRESS, "ahead")])
def test_a_value_that_is_believed_for_ever_is_found(
    source: str, said: Saying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_at_any_age(reading: MetricReading) -> tuple[float | None, str]:
        return replicas_asked(replace(reading, age_s=0.0))

    monkeypatch.setattr("headrace.policy.autoscaling.replicas_asked", asked_at_any_age)
    outcome = World(_calm_world(source, _said(5.0, said, 3))).run()
    assert outcome.violation is not None
    assert "metrics are followed" in outcome.violation.name, outcome.violation
