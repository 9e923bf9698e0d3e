"""Admission: which requests are held, in which order they are bound, and when one is refused. Pure.

Owns the seam `AdmissionQueue`, and its simplest form: first come, first served (`fairness` has the other).
Must not know how a request is answered, or what a replica is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Protocol

import msgspec

MIN_RETRY_AFTER_S = 1
MAX_RETRY_AFTER_S = 60


class HeldRequest(
    msgspec.Struct, frozen=True, gc=False
):  # made for every request: a third of a frozen dataclass's cost
    """One request that waits for a replica with room."""

    request_id: str
    arrived_s: float
    tenant: str = ""


class AdmissionQueue(Protocol):
    """The held requests of one endpoint."""

    max_requests: int
    """Most requests held."""

    def __len__(self) -> int: ...

    def offer(self, request: HeldRequest) -> bool:
        """Hold `request`. False if the queue is full: it must be refused. An id is offered once."""
        ...

    def peek(self, now_s: float) -> HeldRequest | None:
        """Return the request whose turn it is; it stays. None: none is held, or none may be bound now."""
        ...

    def take(self) -> HeldRequest | None:
        """Remove and return the request whose turn it is."""
        ...

    def cancel(self, request_id: str) -> HeldRequest | None:
        """Remove a request whose client left; None if it is not held."""
        ...

    def expire(self, now_s: float, max_wait_s: float) -> list[HeldRequest]:
        """Remove and return every request held longer than max_wait_s."""
        ...

    def oldest_s(self, now_s: float) -> float:
        """How long the oldest request is held, in seconds; 0 when none is."""
        ...


class FifoQueue:
    """First come, first served, at most `max_requests`. All operations take constant time per request."""

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self._requests: OrderedDict[str, HeldRequest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def __repr__(self) -> str:
        return f"<FifoQueue {len(self)}/{self.max_requests}>"

    def offer(self, request: HeldRequest) -> bool:
        assert request.request_id not in self._requests, f"{request.request_id} is offered twice"
        if len(self._requests) >= self.max_requests:
            return False
        self._requests[request.request_id] = request
        return True

    def peek(self, now_s: float) -> HeldRequest | None:
        return next(iter(self._requests.values()), None)

    def take(self) -> HeldRequest | None:
        return self._requests.popitem(last=False)[1] if self._requests else None

    def cancel(self, request_id: str) -> HeldRequest | None:
        return self._requests.pop(request_id, None)

    def expire(self, now_s: float, max_wait_s: float) -> list[HeldRequest]:
        expired: list[HeldRequest] = []
        while self._requests:
            request = next(iter(self._requests.values()))
            if now_s - request.arrived_s < max_wait_s:
                break
            expired.append(self._requests.popitem(last=False)[1])
        return expired

    def oldest_s(self, now_s: float) -> float:
        for request in self._requests.values():
            return max(0.0, now_s - request.arrived_s)
        return 0.0


def retry_after_s(num_ahead: int, served_per_s: float) -> int:
    """When to try again, in whole seconds: the time that `num_ahead` requests take at the measured rate.

    With no rate measured yet (a cold start) the answer is the middle of what is allowed.
    """
    if served_per_s <= 0:
        return MAX_RETRY_AFTER_S // 6
    seconds = min(MAX_RETRY_AFTER_S, (num_ahead + 1) / served_per_s)  # a rate near 0 divides to infinity
    return max(MIN_RETRY_AFTER_S, math.ceil(seconds))
