"""Each tenant at each endpoint, over all gateways, for the status. Pure.

Must not know: processes, or how routers measure.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.api.config import Tenant
from headrace.api.messages import Demand, TenantDemand, TenantStatus


def tenant_statuses(demands: Iterable[Demand], tenants: dict[str, Tenant]) -> list[TenantStatus]:
    """Add up what the routers say of each tenant, by endpoint and name. Each router's `share` is of all
    gateways' work, as far as it has heard of it: the mean is told."""
    parts: dict[tuple[str, str], list[TenantDemand]] = {}
    for demand in demands:
        for part in demand.tenants:
            parts.setdefault((part.endpoint, part.tenant), []).append(part)
    return [_add_up(same, tenants.get(name, Tenant())) for (_, name), same in sorted(parts.items())]


def _add_up(parts: list[TenantDemand], tenant: Tenant) -> TenantStatus:
    return TenantStatus(
        endpoint=parts[0].endpoint,
        tenant=parts[0].tenant,
        weight=tenant.weight,
        priority=tenant.priority,
        num_held=sum(part.num_held for part in parts),
        oldest_held_s=max(part.oldest_held_s for part in parts),
        num_in_flight=sum(part.num_in_flight for part in parts),
        arrived=sum(part.arrived for part in parts),
        finished=sum(part.finished for part in parts),
        refused=sum(part.refused for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        output_tokens=sum(part.output_tokens for part in parts),
        share=sum(part.share for part in parts) / len(parts),
        work_s=sum(part.work_s for part in parts),
    )
