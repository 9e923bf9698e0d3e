"""The router's metrics: what a scrape shows of tenants."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from headrace.api.messages import Demand, TenantDemand
from headrace.observability.request_statistics import RequestStatistics
from headrace.observability.router_metrics import RouterMetrics, RouterSnapshot


def test_tenants_are_shown_by_endpoint_and_name() -> None:
    tenant = TenantDemand("chat", "acme", 3, 1.5, 2, 9, 4, 0, 100, 50, 0.25, 0.75)
    demand = Demand("g1", 1, [], [], [tenant])
    text = RouterMetrics(lambda: RouterSnapshot(demand, {}, RequestStatistics())).exposition().decode()
    shown = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels == {"endpoint": "chat", "tenant": "acme"}
    }
    assert shown == {
        "headrace_router_tenant_held_requests": 3,
        "headrace_router_tenant_oldest_held_seconds": 1.5,
        "headrace_router_tenant_in_flight_requests": 2,
        "headrace_router_tenant_share_ratio": 0.75,
        "headrace_router_tenant_work_seconds": 0.25,
    }
