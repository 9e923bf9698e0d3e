"""When a replica is expected: what the controller says, how it ages, and what a refusal makes of it."""

from __future__ import annotations

import math

import pytest

from headrace.api.messages import EndpointOutlook
from headrace.gateway.arrivals import Refused
from headrace.gateway.outlooks import STALE_AFTER_S, Outlooks


def test_an_outlook_counts_down_to_now_and_is_forgotten_when_nobody_renews_it() -> None:
    outlooks = Outlooks()
    assert outlooks.eta_s("chat", 0.0) < 0
    outlooks.take([EndpointOutlook("chat", 5.0)], 10.0)
    assert outlooks.eta_s("chat", 12.0) == 3.0
    assert outlooks.eta_s("chat", 18.0) == 0.0, "late: expected at any moment"
    assert outlooks.eta_s("chat", 10.0 + STALE_AFTER_S + 1) < 0
    assert outlooks.eta_s("other", 12.0) < 0


@pytest.mark.parametrize("eta_s", [-1.0, math.nan, math.inf, 1e9])
def test_an_impossible_outlook_counts_as_not_known(eta_s: float) -> None:
    outlooks = Outlooks()
    outlooks.take([EndpointOutlook("chat", eta_s)], 0.0)
    assert outlooks.eta_s("chat", 1.0) < 0


def test_a_refusal_says_when_a_replica_is_expected_and_not_to_come_before() -> None:
    outlooks = Outlooks()
    outlooks.take([EndpointOutlook("chat", 7.5)], 0.0)
    refusal = outlooks.complete(Refused("full", "queue_full", 2), "chat", 1.0)
    assert (refusal.eta_s, refusal.retry_after_s) == (6.5, 7)
    limited = Refused("too many", "rate_limit", 2, status=429)
    assert outlooks.complete(limited, "chat", 1.0) is limited
