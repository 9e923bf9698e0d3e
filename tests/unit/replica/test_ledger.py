"""Requests from arrival to their one end, and the metrics that say so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from headrace.api.messages import EngineLoad, FinishedRequest, StepModel, TerminalState
from headrace.clock import VirtualClock
from headrace.observability.front_metrics import FrontMetrics, Histogram
from headrace.replica.ledger import Ledger, RequestRecord


class Listener:
    """Keeps what a ledger tells and logs."""

    def __init__(self) -> None:
        self.num_busy = 0
        self.finished: list[FinishedRequest] = []
        self.lines: list[dict[str, Any]] = []

    def on_busy(self) -> None:
        self.num_busy += 1

    def on_end(self, finished: FinishedRequest) -> None:
        self.finished.append(finished)

    def write(self, fields: dict[str, Any]) -> None:
        self.lines.append(fields)


class World:
    def __init__(self) -> None:
        self.metrics = FrontMetrics("chat", "chat-1")
        self.clock = VirtualClock(50.0)
        self.listener = Listener()
        self.ledger = Ledger(self.metrics, self.listener, self.clock, self.listener)

    def open(self, request_id: str = "r") -> RequestRecord:
        record = RequestRecord(request_id, request_id, "/v1/completions", self.clock.now_s())
        self.ledger.open(record)
        return record


def test_an_end_is_counted_logged_and_reported_once() -> None:
    world = World()
    record = world.open()
    record.num_prompt_tokens, record.num_output_tokens, record.first_token_s = 3, 4, 50.5
    record.engine_s = 0.125
    world.clock.advance(2)
    world.ledger.close(record, TerminalState.FINISHED)
    assert world.listener.finished == [
        FinishedRequest("r", TerminalState.FINISHED, "", "", 3, 0, 4, 0.5, 2.0, 0.125)
    ]
    assert [(line["state"], line["engine_ms"]) for line in world.listener.lines] == [("finished", 125.0)]
    assert world.metrics.engine_s == 0.125
    assert json.dumps(world.listener.lines)
    with pytest.raises(AssertionError, match="ended twice"):
        world.ledger.close(record, TerminalState.FAILED)


@given(st.lists(st.sampled_from(["open", *TerminalState]), max_size=40))
def test_accepted_is_ended_plus_open_after_every_event(events: list[str]) -> None:
    world = World()
    opened: list[RequestRecord] = []
    for event in events:
        if event == "open":
            opened.append(world.open())
        elif opened:
            world.ledger.close(opened.pop(), TerminalState(event))
        world.ledger.check_integrity()
    assert world.ledger.num_open == len(opened)
    assert len(world.listener.finished) == world.metrics.num_accepted - len(opened)


def test_a_broken_sum_is_shown() -> None:
    world = World()
    world.open()
    world.metrics.num_accepted += 1
    with pytest.raises(AssertionError, match=r"2 accepted != .* \+ 1 open"):
        world.ledger.check_integrity()


def test_idle_to_busy_is_told() -> None:
    world = World()
    records = [world.open(), world.open()]
    assert world.listener.num_busy == 1
    for record in records:
        world.ledger.close(record, TerminalState.ABORTED)
    world.open()
    assert world.listener.num_busy == 2


def test_the_metrics_are_prometheus_text() -> None:
    world = World()
    world.ledger.close(world.open(), TerminalState.REFUSED)
    world.metrics.count_http_error(404)
    world.metrics.engine_load = EngineLoad(
        num_free_blocks=25,
        num_total_blocks=100,
        busy_ns=1_500_000_000,
        step_model=StepModel(0.004, 1e-5, 1e-9, 2e-4, 1e-7, 0.03),
    )
    world.metrics.inter_token_latency.observe(0.004)
    families = {f.name: f for f in text_string_to_metric_families(world.metrics.text().decode())}
    states = {sample.labels["state"]: sample.value for sample in families["headrace_requests"].samples}
    assert states == {"finished": 0, "aborted": 0, "refused": 1, "failed": 0}
    assert families["headrace_engine_kv_used_ratio"].samples[0].value == 0.75
    assert families["headrace_engine_busy_seconds"].samples[0].value == 1.5
    assert families["headrace_engine_step_model_fixed_seconds"].samples[0].value == 0.004
    assert families["headrace_engine_step_model_error_ratio"].samples[0].value == 0.03
    assert families["headrace_http_errors"].samples[0].labels["status"] == "404"
    buckets = {s.labels.get("le"): s.value for s in families["headrace_inter_token_latency_seconds"].samples}
    assert (buckets["0.0025"], buckets["0.005"], buckets["+Inf"]) == (0, 1, 1)


def test_a_histogram_counts_a_bound_in_its_own_bucket() -> None:
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert histogram.total == 102.0
