"""When held requests can expect a replica, as the controller last said. No I/O; `now_s` comes in.

Must not know why it takes as long as it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from headrace.api.messages import EndpointOutlook
from headrace.gateway.arrivals import Refused

STALE_AFTER_S = 10.0
"""A controller that said nothing for so long says nothing about now: it tells each second what it expects."""
MAX_ETA_S = 3600.0


class Outlooks:
    """The newest outlook of each endpoint."""

    def __init__(self) -> None:
        self._ready_s: dict[str, float] = {}
        """When a replica is expected, on our clock; negative: not known."""
        self._heard_s = -math.inf

    def __repr__(self) -> str:
        return f"<Outlooks of {', '.join(self._ready_s) or 'nothing'}>"

    def take(self, outlooks: Iterable[EndpointOutlook], now_s: float) -> None:
        """Take what the controller says of all endpoints. What cannot be true counts as not known."""
        self._heard_s = now_s
        self._ready_s = {
            outlook.endpoint: now_s + outlook.eta_s if 0 <= outlook.eta_s <= MAX_ETA_S else -1.0
            for outlook in outlooks
        }

    def eta_s(self, endpoint: str, now_s: float) -> float:
        """Seconds until a replica is expected; negative: not known. One that is late is expected at once."""
        ready_s = self._ready_s.get(endpoint, -1.0)
        if ready_s < 0 or now_s - self._heard_s > STALE_AFTER_S:
            return -1.0
        return max(0.0, ready_s - now_s)

    def complete(self, refusal: Refused, endpoint: str, now_s: float) -> Refused:
        """Return a refusal that says when a replica is expected, and not to come before."""
        eta_s = self.eta_s(endpoint, now_s)
        if refusal.status != 503 or eta_s <= 0:
            return refusal
        retry_after_s = max(refusal.retry_after_s, math.ceil(eta_s))
        return msgspec.structs.replace(refusal, eta_s=eta_s, retry_after_s=retry_after_s)
