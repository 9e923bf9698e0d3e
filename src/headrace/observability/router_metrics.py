"""The router's metrics for Prometheus, each defined here once.

Values are read from the router when somebody scrapes, so that requests pay nothing for them.
Must not know the router: it hands in snapshots of the types below and of `api.messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.api.messages import Demand, TerminalState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """The router's state at one moment."""

    demand: Demand
    totals: dict[str, int]
    """Counter name -> value; names of TOTALS."""


TOTALS = {
    "lost_completions": "Requests whose completion line never came; ended by reconciliation",
    "unseen_completions": "Requests that HAProxy served without the router",
    "answered_by_haproxy": "Requests refused before an endpoint was known (unknown model, too large)",
    "ignored_reports": "Load reports that made no sense",
    "ignored_completions": "Completion lines that made no sense",
    "spoe_errors": "SPOE connections closed because of a frame that made no sense",
    "haproxy_failures": "Runtime API commands that failed and were tried again",
    "haproxy_reloads": "Reloads of HAProxy because the endpoints changed",
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
        yield from _replica_metrics(snapshot.demand)
        for name, text in TOTALS.items():
            yield CounterMetricFamily(f"headrace_router_{name}", text, value=snapshot.totals.get(name, 0))


def _gauge(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"headrace_router_{name}", text, labels=[label])


def _endpoint_metrics(demand: Demand) -> Iterator[Metric]:
    held = _gauge("held_requests", "Requests that wait for a replica", "endpoint")
    oldest = _gauge("oldest_held_seconds", "How long the oldest of them waits", "endpoint")
    in_flight = _gauge("in_flight_requests", "Requests bound to a replica and not ended", "endpoint")
    arrived = CounterMetricFamily("headrace_router_arrived_requests", "Requests taken", labels=["endpoint"])
    ended = CounterMetricFamily(
        "headrace_router_ended_requests", "Requests by terminal state", labels=["endpoint", "state"]
    )
    for endpoint in demand.endpoints:
        name = endpoint.endpoint
        held.add_metric([name], endpoint.num_held)
        oldest.add_metric([name], endpoint.oldest_held_s)
        in_flight.add_metric([name], endpoint.num_in_flight)
        arrived.add_metric([name], endpoint.arrived)
        for state in TerminalState:
            ended.add_metric([name, state.value], getattr(endpoint, state.value))
    yield from (held, oldest, in_flight, arrived, ended)


def _replica_metrics(demand: Demand) -> Iterator[Metric]:
    in_flight = _gauge("replica_in_flight_requests", "Requests bound to the replica", "replica")
    serving = _gauge("replica_serving", "1 if the replica may be chosen", "replica")
    for replica in demand.replicas:
        in_flight.add_metric([replica.replica_id], replica.num_in_flight)
        serving.add_metric([replica.replica_id], int(replica.is_serving))
    yield from (in_flight, serving)


class RouterMetrics:
    """The registry of one router."""

    def __init__(self, snapshot: Callable[[], RouterSnapshot]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(RouterCollector(snapshot))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
