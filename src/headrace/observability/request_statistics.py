"""Ended requests counted for the router's metrics: durations by endpoint, ends and tokens by tenant. Pure.

Bounded: tenants beyond MAX_TENANTS are counted together as `other`. Must not know Prometheus.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.observability.histogram import LATENCY_BOUNDS_S, Histogram
from headrace.observability.request_record import RequestRecord

MAX_TENANTS = 1000
OTHER = "other"
_LONG_BOUNDS_S = (*LATENCY_BOUNDS_S, 300.0, 600.0)


def _durations() -> Histogram:
    return Histogram(_LONG_BOUNDS_S)


@dataclass(slots=True)
class EndpointDurations:
    """One endpoint's durations, in seconds."""

    queue_time: Histogram = field(default_factory=_durations)
    time_to_first_token: Histogram = field(default_factory=_durations)
    e2e_latency: Histogram = field(default_factory=_durations)


@dataclass(slots=True)
class TenantTotals:
    """One tenant at one endpoint."""

    ended: dict[str, int] = field(default_factory=dict)
    """By terminal state."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    engine_s: float = 0.0


class RequestStatistics:
    """All ended requests of one router."""

    def __init__(self) -> None:
        self.durations: dict[str, EndpointDurations] = {}
        self.totals: dict[tuple[str, str], TenantTotals] = {}
        """By (endpoint, tenant)."""
        self.statuses: dict[tuple[str, int], int] = {}
        """By (endpoint, HTTP status); 0: none was sent."""
        self.refusals: dict[tuple[str, str], int] = {}
        """By (endpoint, the router's code)."""
        self._tenants: set[str] = set()

    def observe(self, record: RequestRecord) -> None:
        """Count one ended request."""
        endpoint, tenant = record.endpoint, record.tenant
        if tenant not in self._tenants:
            if len(self._tenants) < MAX_TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = OTHER
        totals = self.totals.get((endpoint, tenant))
        if totals is None:
            totals = self.totals[endpoint, tenant] = TenantTotals()
        totals.ended[record.state] = totals.ended.get(record.state, 0) + 1
        if record.output_tokens is not None:
            totals.prompt_tokens += record.prompt_tokens or 0
            totals.cached_tokens += record.cached_tokens or 0
            totals.output_tokens += record.output_tokens
            totals.engine_s += (record.engine_ms or 0.0) / 1000
        status = (endpoint, record.status or 0)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if record.code:
            refusal = (endpoint, record.code)
            self.refusals[refusal] = self.refusals.get(refusal, 0) + 1
        self._observe_durations(endpoint, record)

    def _observe_durations(self, endpoint: str, record: RequestRecord) -> None:
        durations = self.durations.get(endpoint)
        if durations is None:
            durations = self.durations[endpoint] = EndpointDurations()
        if record.held_ms is not None:
            durations.queue_time.observe(record.held_ms / 1000)
        if record.ttft_ms is not None:
            durations.time_to_first_token.observe(record.ttft_ms / 1000)
        if record.total_ms is not None and record.state == "finished":
            durations.e2e_latency.observe(record.total_ms / 1000)
