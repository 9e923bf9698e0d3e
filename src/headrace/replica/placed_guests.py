"""Guests that routers placed in this engine: counted as the requests that they are, not as streams.

Owns the counts by gateway and by tenant, which the replica reports as if the clients had come to its front.
Must not know connections or engines.
"""

from __future__ import annotations

from collections import Counter

from headrace.api.messages import Placed, gateway_of


class PlacedGuests:
    """All of them, of all durable fronts. Several choices of one request are several guests."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        """Guests by the client's request."""
        self._by_gateway: Counter[str] = Counter()
        self._by_tenant: Counter[str] = Counter()
        self._tenant_of: dict[str, str] = {}
        self.num_streams = 0

    def __repr__(self) -> str:
        return f"PlacedGuests({self.num_streams} streams of {self.num_requests} requests)"

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    def has(self, placed: Placed | None) -> bool:
        """Whether another guest of the same request is here."""
        return placed is not None and placed.request_id in self._streams

    def by_gateway(self) -> dict[str, int]:
        """Return how many requests each gateway placed here."""
        return dict(self._by_gateway)

    def by_tenant(self) -> dict[str, int]:
        """Return how many of them each tenant has."""
        return dict(self._by_tenant)

    def add(self, placed: Placed | None, tenant: str) -> None:
        """A guest came. Nothing happens with one that no router placed."""
        if placed is None:
            return
        request_id = placed.request_id
        if request_id not in self._streams:
            self._tenant_of[request_id] = tenant
            self._by_gateway[gateway_of(request_id)] += 1
            self._by_tenant[tenant] += 1
        self._streams[request_id] += 1
        self.num_streams += 1

    def remove(self, placed: Placed | None) -> None:
        """A guest went."""
        if placed is None:
            return
        request_id = placed.request_id
        self.num_streams -= 1
        _count_down(self._streams, request_id)
        if request_id not in self._streams:
            _count_down(self._by_gateway, gateway_of(request_id))
            _count_down(self._by_tenant, self._tenant_of.pop(request_id))

    def check_integrity(self) -> None:
        """Raise AssertionError, showing the sum, unless the counts agree."""
        assert self.num_streams == self._streams.total(), f"{self.num_streams} streams != {self._streams}"
        for counts in (self._by_gateway, self._by_tenant):
            assert counts.total() == self.num_requests, f"{self.num_requests} requests != {counts}"


def _count_down(counts: Counter[str], name: str) -> None:
    """Keep no zeros: requests, gateways and tenants come and go."""
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
