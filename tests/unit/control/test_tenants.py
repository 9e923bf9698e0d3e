"""Tenants in the status: what the routers say, added up."""

from __future__ import annotations

import pytest

from headrace.api.config import Tenant
from headrace.api.messages import Demand, TenantDemand
from headrace.control.tenants import tenant_statuses


def demand(router_id: str, *tenants: TenantDemand) -> Demand:
    return Demand(router_id, 1, [], [], list(tenants))


def test_the_routers_parts_are_added_up_by_endpoint_and_tenant() -> None:
    first = demand(
        "g1",
        TenantDemand("chat", "b", 1, 0.5, 2, 10, 7, 0, 100, 50, 1.0, 0.4),
        TenantDemand("chat", "a", 0, 0.0, 0, 1, 1, 0, 1, 1, 0.1, 0.6),
    )
    second = demand("g2", TenantDemand("chat", "b", 2, 1.5, 3, 20, 14, 1, 200, 70, 2.0, 0.6))
    known, removed = {"b": Tenant(weight=2, priority="high")}, "a"
    one, other = tenant_statuses([first, second], known)
    assert (one.tenant, one.weight, one.priority) == (removed, 1.0, "normal")
    assert (other.weight, other.priority) == (2.0, "high")
    assert (other.num_held, other.oldest_held_s, other.num_in_flight) == (3, 1.5, 5)
    assert (other.arrived, other.finished, other.refused) == (30, 21, 1)
    assert (other.prompt_tokens, other.output_tokens) == (300, 120)
    assert other.work_s == pytest.approx(3.0)
    assert other.share == pytest.approx(0.5)


def test_without_demand_there_are_no_tenants() -> None:
    assert tenant_statuses([], {}) == []
