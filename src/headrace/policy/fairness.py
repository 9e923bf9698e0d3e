"""The fair queue: whose request is bound next. Priority bands, then work per weight, then first come. Pure.

Inside a band each tenant has a virtual token counter (Sheng et al., "Fairness in serving large language
models", OSDI 2024, arXiv:2401.00588): it grows by the work done for the tenant over its weight, the least one
is served next, and a tenant that was away is lifted to those that were not, so that nobody saves up idleness.
Owns order and bounds. Must not know limits, how work is measured, or how a request is answered.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from headrace.policy.admission import HeldRequest

BANDS = ("high", "normal", "low")
MAX_TENANTS = 16_384
"""Tenants without held requests whose counters one queue remembers."""
MAX_LEAD_S = 30.0
"""How far work that was done by others' decisions (`charge_elsewhere`) may push a tenant behind the rest of
its band, in engine-seconds: no more, so that whoever loses a gateway does not wait for minutes."""
_COMPACT_AT = 64


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant is due."""

    weight: float = 1.0
    """Twice the weight, twice the work."""
    band: int = 1
    """Index into BANDS: while one of a lower number may be bound, none of a higher number is."""
    max_wait_s: float = 0.0
    """Longest wait, when it is less than the endpoint's; 0: the endpoint's."""


DEFAULT_SHARE = Share()


class _Tenant:
    """One tenant's held requests and counter."""

    __slots__ = ("counter", "entry", "held", "is_passed_over", "last_served", "name", "share")

    def __init__(self, name: str, share: Share) -> None:
        self.name = name
        self.share = share
        self.held: OrderedDict[str, HeldRequest] = OrderedDict()
        self.counter = 0.0
        self.entry = 0
        """Number of its one valid entry in the band's heap; 0: none."""
        self.last_served = 0
        """When it was last served, in requests served; breaks ties for whom it is longer ago."""
        self.is_passed_over = False


_Entry = tuple[float, int, int, _Tenant]
"""Counter, last_served, entry number, tenant. Valid while the tenant's `entry` is that number."""


class _Band:
    """The tenants of one priority whose turn may come."""

    __slots__ = ("heap", "last_served", "num_waiting")

    def __init__(self) -> None:
        self.heap: list[_Entry] = []
        self.num_waiting = 0
        self.last_served: _Tenant | None = None

    def first(self) -> _Tenant | None:
        """Return the tenant with the least counter. Amortised O(log tenants)."""
        heap = self.heap
        while heap:
            entry = heap[0]
            if entry[3].entry == entry[2]:
                return entry[3]
            heappop(heap)
        return None

    def level(self) -> float:
        """The counter that a tenant coming back is lifted to."""
        first = self.first() or self.last_served
        return first.counter if first is not None else 0.0


class FairQueue:
    """An `AdmissionQueue` of at most `max_requests`. Operations take O(log tenants), amortised, but for what
    looks at every waiting tenant: `expire`, `oldest_s` and `shed`."""

    def __init__(self, max_requests: int, shares: Mapping[str, Share] | None = None) -> None:
        self.max_requests = max_requests
        self._shares = shares if shares is not None else {}
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: dict[str, _Tenant] = {}
        self._holder: dict[str, _Tenant] = {}
        self._bands = tuple(_Band() for _ in BANDS)
        self._num_entries = 0
        self._num_served = 0

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
        known = self._waiting.get(tenant)
        return len(known.held) if known is not None else 0

    def share(self, tenant: str) -> Share:
        """Return what a tenant is due."""
        return self._shares.get(tenant, DEFAULT_SHARE)

    def held_by(self, tenant: str) -> list[str]:
        """Return the ids of a tenant's held requests, oldest first."""
        known = self._waiting.get(tenant)
        return list(known.held) if known is not None else []

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
        tenant = self._tenant(request.tenant)
        if not tenant.held:
            self._waiting[tenant.name] = tenant
            if not tenant.is_passed_over:
                self._enter(tenant)
        tenant.held[request.request_id] = request
        self._holder[request.request_id] = tenant
        return True

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
        self._serve(tenant, work)
        if tenant.held:
            self._push(tenant)
        else:
            self._leave(tenant)
        return request

    def serve(self, name: str, work: float) -> None:
        """Charge a tenant for a request that is bound at once, since nobody's turn was before it."""
        tenant = self._tenant(name)
        if not tenant.entry:
            tenant.counter = max(tenant.counter, self._bands[tenant.share.band].level())
        self._serve(tenant, work)
        if tenant.entry:
            self._push(tenant)

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
        if tenant is None or not math.isfinite(work):
            return
        tenant.counter = max(0.0, tenant.counter + work / tenant.share.weight)
        if tenant.entry:
            self._push(tenant)

    def charge_elsewhere(self, name: str, work: float) -> None:
        """Charge a tenant with work that another queue's decision gave it, up to MAX_LEAD_S ahead."""
        if not 0 < work < math.inf:
            return
        tenant = self._tenant(name)
        level = self._bands[tenant.share.band].level()
        if not tenant.entry:
            tenant.counter = max(tenant.counter, level)
        raised = min(tenant.counter + work / tenant.share.weight, level + MAX_LEAD_S)
        if raised > tenant.counter:
            tenant.counter = raised
            if tenant.entry:
                self._push(tenant)

    # ---- tenants

    def pass_over(self, name: str) -> None:
        """Bind no request of this tenant until `bring_back`; its requests stay held, in their order."""
        tenant = self._tenant(name)
        if not tenant.is_passed_over:
            tenant.is_passed_over = True
            self._exit(tenant)

    def bring_back(self, name: str) -> bool:
        """Let a tenant's turn come again; True if it was passed over."""
        tenant = self._tenants.get(name)
        if tenant is None or not tenant.is_passed_over:
            return False
        tenant.is_passed_over = False
        if tenant.held:
            self._enter(tenant)
        return True

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Take new shares. Held requests keep their place in their tenant's line. Who changes the band starts
        there as a newcomer: counters of different bands say nothing about each other."""
        self._shares = shares
        for tenant in list(self._tenants.values()):
            share = shares.get(tenant.name, DEFAULT_SHARE)
            if share.band != tenant.share.band:
                is_waiting = tenant.entry != 0
                self._exit(tenant)
                for band in self._bands:
                    if band.last_served is tenant:
                        band.last_served = None
                tenant.share, tenant.counter = share, 0.0
                if is_waiting:
                    self._enter(tenant)
            tenant.share = share
            if tenant.name not in shares and not tenant.held and not tenant.is_passed_over:
                self._forget(tenant)

    def explain(self) -> str:
        """Say why the request at `peek` is next."""
        tenant = self._first()
        if tenant is None:
            return "nobody's turn"
        band = self._bands[tenant.share.band]
        return (
            f"least work per weight ({tenant.counter:.6g}) of {band.num_waiting} waiting tenants "
            f"of {BANDS[tenant.share.band]} priority"
        )

    def counter(self, name: str) -> float:
        """A tenant's work per weight, as far as it counts; 0 if it is not remembered."""
        tenant = self._tenants.get(name)
        return tenant.counter if tenant is not None else 0.0

    def check_integrity(self) -> None:
        """Raise AssertionError, showing what differs, if a request or a turn was lost."""
        held = sum(len(tenant.held) for tenant in self._tenants.values())
        assert held == len(self._holder), f"{held} held by tenants != {len(self._holder)} known"
        waiting = {name for name, tenant in self._tenants.items() if tenant.held}
        assert waiting == self._waiting.keys(), f"{waiting} hold requests != {set(self._waiting)} waiting"
        for number, band in enumerate(self._bands):
            valid = [entry for entry in band.heap if entry[3].entry == entry[2]]
            turns = {entry[3].name for entry in valid}
            due = {
                tenant.name
                for tenant in self._waiting.values()
                if tenant.share.band == number and not tenant.is_passed_over
            }
            assert turns == due, f"{BANDS[number]}: turns of {turns} != waiting {due}"
            assert len(valid) == band.num_waiting, f"{len(valid)} turns != {band.num_waiting} counted"
            assert all(entry[0] == entry[3].counter for entry in valid), "a turn's counter is out of date"
            assert len(band.heap) <= 2 * band.num_waiting + _COMPACT_AT, f"{len(band.heap)} entries"
        assert len(self._tenants) <= MAX_TENANTS + len(self._holder), f"{len(self._tenants)} tenants"

    # ---- inside

    def _first(self) -> _Tenant | None:
        for band in self._bands:
            if band.num_waiting:
                return band.first()
        return None

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= MAX_TENANTS:
                self._forget_idle()
            tenant = self._tenants[name] = _Tenant(name, self._shares.get(name, DEFAULT_SHARE))
        return tenant

    def _serve(self, tenant: _Tenant, work: float) -> None:
        self._num_served += 1
        tenant.last_served = self._num_served
        if 0 < work < math.inf:
            tenant.counter += work / tenant.share.weight
        self._bands[tenant.share.band].last_served = tenant

    def _enter(self, tenant: _Tenant) -> None:
        """Its turn may come: lift it to those that waited while it did not."""
        band = self._bands[tenant.share.band]
        tenant.counter = max(tenant.counter, band.level())
        band.num_waiting += 1
        self._push(tenant)

    def _push(self, tenant: _Tenant) -> None:
        band = self._bands[tenant.share.band]
        self._num_entries += 1
        tenant.entry = self._num_entries
        heappush(band.heap, (tenant.counter, tenant.last_served, tenant.entry, tenant))
        if len(band.heap) > 2 * band.num_waiting + _COMPACT_AT:
            band.heap = [entry for entry in band.heap if entry[3].entry == entry[2]]
            heapify(band.heap)

    def _exit(self, tenant: _Tenant) -> None:
        if tenant.entry:
            tenant.entry = 0
            self._bands[tenant.share.band].num_waiting -= 1

    def _leave(self, tenant: _Tenant) -> None:
        """It holds no request any more."""
        self._exit(tenant)
        del self._waiting[tenant.name]

    def _forget(self, tenant: _Tenant) -> None:
        del self._tenants[tenant.name]

    def _forget_idle(self) -> None:
        """Forget tenants that hold nothing. Those at or below their band's level lose nothing by it: they
        would be lifted to it anyway. If that is not enough, those nearest to it are forgiven their lead."""
        idle = [each for each in self._tenants.values() if not each.held and not each.is_passed_over]
        idle.sort(key=lambda tenant: tenant.counter - self._bands[tenant.share.band].level())
        wanted = max(1, MAX_TENANTS // 8)
        for position, tenant in enumerate(idle):
            is_above = tenant.counter > self._bands[tenant.share.band].level()
            if is_above and position >= wanted:
                break
            self._forget(tenant)


def _oldest(tenant: _Tenant) -> HeldRequest:
    return next(iter(tenant.held.values()))


def _excess(tenant: _Tenant) -> tuple[int, float]:
    return tenant.share.band, len(tenant.held) / tenant.share.weight
