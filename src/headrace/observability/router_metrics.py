"""The router's metrics for Prometheus, each defined here once.

Values are read from the router when somebody scrapes, so that requests pay nothing for them.
Must not know the router: it hands in snapshots of the types below and of `api.messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.api.messages import Demand, TerminalState
from headrace.observability.request_statistics import RequestStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """The router's state at one moment."""

    demand: Demand
    totals: dict[str, int]
    """Counter name -> value; names of TOTALS."""
    requests: RequestStatistics


TOTALS = {
    "lost_completions": "Requests whose completion line never came; ended by reconciliation",
    "unseen_completions": "Requests that HAProxy served without the router",
    "answered_by_haproxy": "Requests refused before an endpoint was known (unknown model, too large)",
    "ignored_reports": "Load reports that made no sense",
    "ignored_ends": "Ends of requests in load reports that made no sense",
    "ignored_completions": "Completion lines that made no sense",
    "spoe_errors": "SPOE connections closed because of a frame that made no sense",
    "haproxy_failures": "Runtime API commands that failed and were tried again",
    "haproxy_reloads": "Reloads of HAProxy because the endpoints changed",
    "incomplete_records": "Lines of the request log that lack what HAProxy or a front should have said",
    "dropped_log_lines": "Lines of the request log that were not written: the disk is full or too slow",
}


class RouterCollector(Collector):
    """Turns a snapshot into metric families."""

    def __init__(self, snapshot: Callable[[], RouterSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        yield from _endpoint_metrics(snapshot.demand)
        yield from _tenant_metrics(snapshot.demand)
        yield from _replica_metrics(snapshot.demand)
        yield from _request_metrics(snapshot.requests)
        yield from _duration_metrics(snapshot.requests)
        for name, text in TOTALS.items():
            yield CounterMetricFamily(f"headrace_router_{name}", text, value=snapshot.totals.get(name, 0))


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"headrace_router_{name}", text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"headrace_router_{name}", text, labels=labels)


def _endpoint_metrics(demand: Demand) -> Iterator[Metric]:
    held = _gauge("held_requests", "Requests that wait for a replica", "endpoint")
    oldest = _gauge("oldest_held_seconds", "How long the oldest of them waits", "endpoint")
    in_flight = _gauge("in_flight_requests", "Requests bound to a replica and not ended", "endpoint")
    arrived = _counter("arrived_requests", "Requests taken", "endpoint")
    ended = _counter("ended_requests", "Requests by terminal state", "endpoint", "state")
    for endpoint in demand.endpoints:
        name = endpoint.endpoint
        held.add_metric([name], endpoint.num_held)
        oldest.add_metric([name], endpoint.oldest_held_s)
        in_flight.add_metric([name], endpoint.num_in_flight)
        arrived.add_metric([name], endpoint.arrived)
        for state in TerminalState:
            ended.add_metric([name, state.value], getattr(endpoint, state.value))
    yield from (held, oldest, in_flight, arrived, ended)


def _tenant_metrics(demand: Demand) -> Iterator[Metric]:
    """The tenants that Demand carries: of very many, the most active."""
    labels = ("endpoint", "tenant")
    held = _gauge("tenant_held_requests", "Requests of the tenant that wait for a replica", *labels)
    oldest = _gauge("tenant_oldest_held_seconds", "How long the oldest of them waits", *labels)
    in_flight = _gauge("tenant_in_flight_requests", "Requests of the tenant bound to a replica", *labels)
    share = _gauge("tenant_share_ratio", "Its part of the endpoint's work in the last minute", *labels)
    # A gauge: an estimate that was too high is taken back at the request's end.
    work = _gauge("tenant_work_seconds", "Engine time charged to the tenant since the start", *labels)
    for tenant in demand.tenants:
        values = [tenant.endpoint, tenant.tenant]
        held.add_metric(values, tenant.num_held)
        oldest.add_metric(values, tenant.oldest_held_s)
        in_flight.add_metric(values, tenant.num_in_flight)
        share.add_metric(values, tenant.share)
        work.add_metric(values, tenant.work_s)
    yield from (held, oldest, in_flight, share, work)


def _replica_metrics(demand: Demand) -> Iterator[Metric]:
    in_flight = _gauge("replica_in_flight_requests", "Requests bound to the replica", "replica")
    serving = _gauge("replica_serving", "1 if the replica may be chosen", "replica")
    for replica in demand.replicas:
        in_flight.add_metric([replica.replica_id], replica.num_in_flight)
        serving.add_metric([replica.replica_id], int(replica.is_serving))
    yield from (in_flight, serving)


def _request_metrics(requests: RequestStatistics) -> Iterator[Metric]:
    by_tenant = _counter("tenant_requests", "Ended requests by tenant", "endpoint", "tenant", "state")
    prompt = _counter("prompt_tokens", "Prompt tokens of ended requests", "endpoint", "tenant")
    cached = _counter("cached_tokens", "Prompt tokens that prefix caches spared", "endpoint", "tenant")
    output = _counter("generation_tokens", "Generated tokens", "endpoint", "tenant")
    engine = _counter("engine_seconds", "Engine time measured for ended requests", "endpoint", "tenant")
    for (endpoint, tenant), totals in requests.totals.items():
        for state, count in totals.ended.items():
            by_tenant.add_metric([endpoint, tenant, state], count)
        prompt.add_metric([endpoint, tenant], totals.prompt_tokens)
        cached.add_metric([endpoint, tenant], totals.cached_tokens)
        output.add_metric([endpoint, tenant], totals.output_tokens)
        engine.add_metric([endpoint, tenant], totals.engine_s)
    statuses = _counter("responses", "Ended requests by HTTP status; 0: none was sent", "endpoint", "status")
    for (endpoint, status), count in requests.statuses.items():
        statuses.add_metric([endpoint, str(status)], count)
    refusals = _counter("refusals", "Requests that the router refused, by its reason", "endpoint", "code")
    for (endpoint, code), count in requests.refusals.items():
        refusals.add_metric([endpoint, code], count)
    yield from (by_tenant, prompt, cached, output, engine, statuses, refusals)


def _duration_metrics(requests: RequestStatistics) -> Iterator[Metric]:
    queue_time = _histogram("request_queue_time_seconds", "Arrival to being bound or refused")
    first_token = _histogram("time_to_first_token_seconds", "Arrival at the gateway to the first token")
    latency = _histogram("e2e_request_latency_seconds", "Arrival to the last byte, of finished requests")
    for endpoint, durations in requests.durations.items():
        for family, histogram in (
            (queue_time, durations.queue_time),
            (first_token, durations.time_to_first_token),
            (latency, durations.e2e_latency),
        ):
            family.add_metric([endpoint], histogram.cumulative(), histogram.total)
    yield from (queue_time, first_token, latency)


def _histogram(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"headrace_router_{name}", text, labels=["endpoint"])


class RouterMetrics:
    """The registry of one router."""

    def __init__(self, snapshot: Callable[[], RouterSnapshot]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(RouterCollector(snapshot))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
