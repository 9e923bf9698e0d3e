"""The fair queue: whose request is bound next. Priority bands, then work per weight, then first come. Pure.

A tenant's requests wait in their order; between tenants of a band the least virtual token counter decides
(`virtual_counters`). Owns the held requests and their bound. Must not know limits, how work is measured, or
how a request is answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count

from headrace.policy.admission import HeldRequest
from headrace.policy.virtual_counters import BANDS, MAX_LEAD_S, Band, Share, TenantCounter

MAX_TENANTS = 16_384
"""Tenants without held requests whose counters one queue remembers."""
DEFAULT_SHARE = Share()


class FairQueue:
    """An `AdmissionQueue` of at most `max_requests`. Operations take O(log tenants), amortised, but for what
    looks at every waiting tenant: `expire`, `oldest_s` and `shed`."""

    def __init__(self, max_requests: int, shares: Mapping[str, Share] | None = None) -> None:
        self.max_requests = max_requests
        self._shares = shares if shares is not None else {}
        self._tenants: dict[str, TenantCounter] = {}
        self._waiting: dict[str, TenantCounter] = {}
        self._holder: dict[str, TenantCounter] = {}
        numbers = count(1)
        self._bands = tuple(Band(numbers) for _ in BANDS)
        self._num_served = 0
        self.second = 1.0
        """How much work is an engine-second: other than 1 while no engine has measured."""

    def __len__(self) -> int:
        return len(self._holder)

    def __repr__(self) -> str:
        return f"<FairQueue {len(self)}/{self.max_requests} of {len(self._waiting)} tenants>"

    # ---- who waits

    @property
    def has_turn(self) -> bool:
        """Whether a held request may be bound. Those of tenants that are passed over may not."""
        high, normal, low = self._bands
        return (high.num_waiting or normal.num_waiting or low.num_waiting) > 0

    @property
    def num_tenants_waiting(self) -> int:
        return len(self._waiting)

    def num_held(self, tenant: str) -> int:
        return len(self._waiting[tenant].held) if tenant in self._waiting else 0

    def share(self, tenant: str) -> Share:
        """Return what a tenant is due."""
        return self._shares.get(tenant, DEFAULT_SHARE)

    def held_by(self, tenant: str) -> list[str]:
        """Return the ids of a tenant's held requests, oldest first."""
        return list(self._waiting[tenant].held) if tenant in self._waiting else []

    def oldest_s(self, now_s: float, tenant: str | None = None) -> float:
        """How long the oldest request (of `tenant`, if given) is held, in seconds; 0 when none is."""
        if tenant is None:
            waiting = list(self._waiting.values())
        else:
            waiting = [self._waiting[tenant]] if tenant in self._waiting else []
        return max([0.0, *(now_s - _oldest(each).arrived_s for each in waiting)])

    # ---- requests come and go

    def offer(self, request: HeldRequest) -> bool:
        assert request.request_id not in self._holder, f"{request.request_id} is offered twice"
        if len(self._holder) >= self.max_requests:
            return False
        self._hold(request)
        return True

    def put_back(self, request: HeldRequest) -> None:
        """Hold again what was taken: before its tenant's others, beyond `max_requests` if need be."""
        assert request.request_id not in self._holder, f"{request.request_id} is put back twice"
        self._hold(request).held.move_to_end(request.request_id, last=False)

    def peek(self, now_s: float) -> HeldRequest | None:
        tenant = self._first()
        return _oldest(tenant) if tenant is not None else None

    def take(self, work: float = 0.0) -> HeldRequest | None:
        """Remove and return the request whose turn it is, and charge its tenant with `work`."""
        tenant = self._first()
        if tenant is None:
            return None
        request_id, request = tenant.held.popitem(last=False)
        del self._holder[request_id]
        if not tenant.held:
            self._leave(tenant)
        self._serve(tenant, work)
        return request

    def serve(self, name: str, work: float) -> None:
        """Charge a tenant for a request that is bound at once, since nobody's turn was before it."""
        tenant = self._tenant(name)
        if not tenant.entry:
            self._band(tenant).lift(tenant, self.second)
        self._serve(tenant, work)

    def cancel(self, request_id: str) -> HeldRequest | None:
        tenant = self._holder.pop(request_id, None)
        if tenant is None:
            return None
        request = tenant.held.pop(request_id)
        if not tenant.held:
            self._leave(tenant)
        return request

    def expire(self, now_s: float, max_wait_s: float) -> list[HeldRequest]:
        expired: list[HeldRequest] = []
        for tenant in list(self._waiting.values()):
            limit_s = tenant.share.max_wait_s
            limit_s = min(limit_s, max_wait_s) if limit_s else max_wait_s
            while tenant.held and now_s - _oldest(tenant).arrived_s >= limit_s:
                request_id, request = tenant.held.popitem(last=False)
                del self._holder[request_id]
                expired.append(request)
            if not tenant.held:
                self._leave(tenant)
        return expired

    def clear(self) -> list[HeldRequest]:
        """Remove and return every held request, those of tenants that are passed over included."""
        requests = [request for tenant in self._waiting.values() for request in tenant.held.values()]
        for request in requests:
            self.cancel(request.request_id)
        return requests

    def shed(self, name: str) -> HeldRequest | None:
        """Make room in a full queue for a request of tenant `name`: remove and return the youngest request of
        whoever holds most for its weight, in the lowest band that waits. None: nobody of a lower band waits,
        and no other holds more for its weight; then the request itself is the one to refuse."""
        tenant = self._tenant(name)
        own = (tenant.share.band, (len(tenant.held) + 1) / tenant.share.weight)
        most = max(self._waiting.values(), key=_excess, default=None)
        if most is None or most is tenant or (most.share.band, _excess(most)[1]) <= own:
            return None
        return self.cancel(next(reversed(most.held)))

    # ---- work that was done

    def charge(self, name: str, work: float) -> None:
        """Correct a tenant's counter by `work`, which may be negative: an estimate met its measurement."""
        tenant = self._tenants.get(name)
        if tenant is not None and math.isfinite(work):
            self._band(tenant).add(tenant, work)

    def charge_elsewhere(self, name: str, work: float) -> None:
        """Charge a tenant with work that another queue's decision gave it, up to MAX_LEAD_S ahead."""
        if not 0 < work < math.inf:
            return
        tenant = self._tenant(name)
        band = self._band(tenant)
        if not tenant.entry:
            band.lift(tenant, self.second)
        allowed = (band.level() + MAX_LEAD_S * self.second - tenant.value) * tenant.share.weight
        if allowed > 0:
            band.add(tenant, min(work, allowed))

    # ---- tenants

    def pass_over(self, name: str) -> None:
        """Bind no request of this tenant until `bring_back`; its requests stay held, in their order."""
        tenant = self._tenant(name)
        if not tenant.is_passed_over:
            tenant.is_passed_over = True
            self._band(tenant).leave(tenant)

    def bring_back(self, name: str) -> bool:
        """Let a tenant's turn come again; True if it was passed over."""
        tenant = self._tenants.get(name)
        if tenant is None or not tenant.is_passed_over:
            return False
        tenant.is_passed_over = False
        if tenant.held:
            self._band(tenant).enter(tenant, self.second)
        return True

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Take new shares. Held requests keep their place in their tenant's line. Who changes the band starts
        there as a newcomer: counters of different bands say nothing about each other."""
        self._shares = shares
        for tenant in list(self._tenants.values()):
            share = shares.get(tenant.name, DEFAULT_SHARE)
            if share.band != tenant.share.band:
                is_waiting = tenant.entry != 0
                self._band(tenant).leave(tenant)
                for band in self._bands:
                    if band.last_served is tenant:
                        band.last_served = None
                tenant.share, tenant.value, tenant.credit = share, 0.0, 0.0
                if is_waiting:
                    self._band(tenant).enter(tenant, self.second)
            tenant.share = share
            if tenant.name not in shares and not tenant.held and not tenant.is_passed_over:
                del self._tenants[tenant.name]

    def explain(self) -> str:
        """Say why the request at `peek` is next."""
        tenant = self._first()
        if tenant is None:
            return "nobody's turn"
        band = self._bands[tenant.share.band]
        return (
            f"least work per weight ({tenant.value:.6g}) of {band.num_waiting} waiting tenants "
            f"of {BANDS[tenant.share.band]} priority"
        )

    def counter(self, name: str) -> float:
        """A tenant's work per weight, as far as it counts; 0 if it is not remembered."""
        tenant = self._tenants.get(name)
        return tenant.value if tenant is not None else 0.0

    def check_integrity(self) -> None:
        """Raise AssertionError, showing what differs, if a request or a turn was lost."""
        held = sum(len(tenant.held) for tenant in self._tenants.values())
        assert held == len(self._holder), f"{held} held by tenants != {len(self._holder)} known"
        waiting = {name for name, tenant in self._tenants.items() if tenant.held}
        assert waiting == self._waiting.keys(), f"{waiting} hold requests != {set(self._waiting)} waiting"
        for number, band in enumerate(self._bands):
            turns = band.turns().keys()
            due = {
                tenant.name
                for tenant in self._waiting.values()
                if tenant.share.band == number and not tenant.is_passed_over
            }
            assert turns == due, f"{BANDS[number]}: turns of {turns} != waiting {due}"
        assert len(self._tenants) <= MAX_TENANTS + len(self._holder), f"{len(self._tenants)} tenants"

    # ---- inside

    def _hold(self, request: HeldRequest) -> TenantCounter:
        tenant = self._tenant(request.tenant)
        if not tenant.held:
            self._waiting[tenant.name] = tenant
            if not tenant.is_passed_over:
                self._band(tenant).enter(tenant, self.second)
        tenant.held[request.request_id] = request
        self._holder[request.request_id] = tenant
        return tenant

    def _first(self) -> TenantCounter | None:
        for band in self._bands:
            if band.num_waiting:
                return band.first()
        return None

    def _band(self, tenant: TenantCounter) -> Band:
        return self._bands[tenant.share.band]

    def _tenant(self, name: str) -> TenantCounter:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= MAX_TENANTS:
                self._forget_idle()
            tenant = self._tenants[name] = TenantCounter(name, self._shares.get(name, DEFAULT_SHARE))
        return tenant

    def _serve(self, tenant: TenantCounter, work: float) -> None:
        band = self._band(tenant)
        self._num_served += 1
        tenant.last_served = self._num_served
        band.last_served = tenant
        band.add(tenant, work if 0 < work < math.inf else 0.0)

    def _leave(self, tenant: TenantCounter) -> None:
        """It holds no request any more."""
        self._band(tenant).leave(tenant)
        del self._waiting[tenant.name]

    def _forget_idle(self) -> None:
        """Forget tenants that hold nothing. Those below their band's level by their credit or more lose
        nothing by it: they would be lifted anyway. If that is not enough, the others, nearest to it first:
        each is forgiven what it is ahead, or given what its credit lacks."""
        idle = [each for each in self._tenants.values() if not each.held and not each.is_passed_over]
        idle.sort(key=lambda tenant: tenant.value - self._band(tenant).level())
        wanted = max(1, MAX_TENANTS // 8)
        for position, tenant in enumerate(idle):
            lowest = self._band(tenant).level() - tenant.most_credit(self.second)
            if position >= wanted and tenant.value > lowest:
                break
            del self._tenants[tenant.name]


def _oldest(tenant: TenantCounter) -> HeldRequest:
    return next(iter(tenant.held.values()))


def _excess(tenant: TenantCounter) -> tuple[int, float]:
    return tenant.share.band, len(tenant.held) / tenant.share.weight
