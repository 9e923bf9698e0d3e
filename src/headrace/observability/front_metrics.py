"""The front's metrics, each defined once, and their Prometheus text.

Owns names, meanings and buckets. Plain numbers inside: a token must not cost a metrics library call.
Must not know HTTP, text or engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from headrace.api.messages import EngineLoad, StepModel, TerminalState
from headrace.observability.histogram import LATENCY_BOUNDS_S, Histogram

ResumeCause = Literal["engine_lost", "handover"]
"""Why a stream went on elsewhere. handover: its replica leaves, or goes on standby."""
_GAP_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_ITL_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class FrontMetrics:
    """All counters of one front. Counters only grow; gauges are set when the text is asked for."""

    def __init__(self, endpoint: str, replica_id: str) -> None:
        self._labels = {"endpoint": endpoint, "replica": replica_id}
        self.num_accepted = 0
        """Requests that arrived at a generation route; each ends in exactly one terminal state."""
        self.num_ended = dict.fromkeys(TerminalState, 0)
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.engine_s = 0.0
        """Engine time of ended requests."""
        self.num_http_errors: dict[int, int] = {}
        """Error answers outside of generation, by status."""
        self.num_open = 0
        self.num_engine_restarts = 0
        self.is_ready = False
        self.engine_load = EngineLoad()
        self.time_to_first_token = Histogram(LATENCY_BOUNDS_S)
        self.inter_token_latency = Histogram(_ITL_BOUNDS_S)
        self.e2e_latency = Histogram(LATENCY_BOUNDS_S)
        self.num_resumed: dict[ResumeCause, int] = {"engine_lost": 0, "handover": 0}
        """Times that a stream was sent to another engine, or again to its own."""
        self.num_resumed_tokens = 0
        self.num_given_up = 0
        self.resume_gap = Histogram(_GAP_BOUNDS_S)
        self.num_guests = 0
        self.num_hosted = 0
        self.num_stranded = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def count_http_error(self, status: int) -> None:
        self.num_http_errors[status] = self.num_http_errors.get(status, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        yield from self._counters()
        yield from self._histograms()
        load = self.engine_load
        used = load.num_total_blocks - load.num_free_blocks
        gauges: tuple[tuple[str, str, float], ...] = (
            ("requests_open", "Requests open in the front", self.num_open),
            ("ready", "1 while requests are taken", self.is_ready),
            ("streams_guests", "Streams of siblings in this replica's engine", self.num_guests),
            ("streams_hosted", "Own streams in siblings' engines", self.num_hosted),
            ("streams_stranded", "Own streams that wait for an engine", self.num_stranded),
            ("engine_requests_running", "Requests in the engine's batch", load.num_running),
            ("engine_requests_waiting", "Requests that wait in the engine", load.num_waiting),
            ("engine_kv_blocks_free", "KV blocks that can be allocated at once", load.num_free_blocks),
            ("engine_kv_blocks_total", "KV blocks", load.num_total_blocks),
            (
                "engine_kv_used_ratio",
                "KV blocks that requests hold, 0 to 1",
                used / max(1, load.num_total_blocks),
            ),
            ("engine_step_seconds", "Duration of the last step", load.step_s),
            *_step_model_gauges(load.step_model),
        )
        for name, help_text, value in gauges:
            gauge = GaugeMetricFamily(f"headrace_{name}", help_text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), float(value))
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        ended = CounterMetricFamily(
            "headrace_requests", "Requests by terminal state", labels=[*names, "state"]
        )
        for state, count in self.num_ended.items():
            ended.add_metric([*values, state.value], count)
        yield ended
        errors = CounterMetricFamily(
            "headrace_http_errors", "Error answers outside of generation", labels=[*names, "status"]
        )
        for status, count in self.num_http_errors.items():
            errors.add_metric([*values, str(status)], count)
        yield errors
        resumed = CounterMetricFamily(
            "headrace_streams_resumed",
            "Streams continued in another engine, or in their own after a restart, by cause",
            labels=[*names, "cause"],
        )
        for cause, count in self.num_resumed.items():
            resumed.add_metric([*values, cause], count)
        yield resumed
        load = self.engine_load
        counters = (
            ("requests_accepted", "Requests that arrived", self.num_accepted),
            ("prompt_tokens", "Prompt tokens of ended requests", self.num_prompt_tokens),
            ("cached_tokens", "Prompt tokens that the prefix cache spared", self.num_cached_tokens),
            ("generation_tokens", "Generated tokens", self.num_output_tokens),
            ("resumed_tokens", "Tokens that streams had when they were continued", self.num_resumed_tokens),
            ("streams_given_up", "Streams that no engine could continue", self.num_given_up),
            ("engine_restarts", "Engine processes started after a death", self.num_engine_restarts),
            ("engine_preemptions", "Preemptions in this engine process", load.num_preemptions),
            ("engine_steps", "Steps of this engine process", load.steps),
            (
                "engine_imported_tokens",
                "Tokens whose keys and values this engine process copied from another's memory",
                load.num_imported_tokens,
            ),
            ("request_engine_seconds", "Engine time measured for ended requests", self.engine_s),
            ("engine_busy_seconds", "Time in which this engine had requests", load.busy_ns * 1e-9),
            ("engine_idle_seconds", "Time in which it had none", load.idle_ns * 1e-9),
            (
                "spec_decode_num_draft_tokens",
                "Tokens that this engine process guessed ahead and verified",
                load.num_draft_tokens,
            ),
            (
                "spec_decode_num_accepted_tokens",
                "Tokens that were guessed right: each saved a step",
                load.num_accepted_tokens,
            ),
        )
        for name, help_text, value in counters:
            counter = CounterMetricFamily(f"headrace_{name}", help_text, labels=names)
            counter.add_metric(values, value)
            yield counter

    def _histograms(self) -> Iterator[Metric]:
        histograms = (
            ("time_to_first_token_seconds", "Arrival to the first token", self.time_to_first_token),
            (
                "inter_token_latency_seconds",
                "Gap between two tokens of different steps",
                self.inter_token_latency,
            ),
            ("e2e_request_latency_seconds", "Arrival to the end", self.e2e_latency),
            ("stream_gap_seconds", "Loss of a stream's engine to its next token", self.resume_gap),
        )
        for name, help_text, histogram in histograms:
            family = HistogramMetricFamily(f"headrace_{name}", help_text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), histogram.cumulative(), histogram.total)
            yield family


def _step_model_gauges(model: StepModel | None) -> tuple[tuple[str, str, float], ...]:
    """What the engine found its steps to take: seconds = a + b*P + q*P*C + c*D + d*KV."""
    model = model or StepModel(0.0, 0.0, 0.0, 0.0, 0.0)
    return (
        ("engine_step_model_fixed_seconds", "A step's fixed time", model.a),
        ("engine_step_model_prompt_token_seconds", "Per uncached prompt token", model.b),
        ("engine_step_model_attended_token_seconds", "Per token that a prompt token attends to", model.q),
        ("engine_step_model_decoded_token_seconds", "Per decoded token", model.c),
        ("engine_step_model_kv_token_seconds", "Per token of context that decoding reads", model.d),
        (
            "engine_step_model_error_ratio",
            "Mean relative error of its predictions, over recent steps",
            model.relative_error,
        ),
    )
