"""Limits: what a minute holds, what is owed, who has room; whatever the clock does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import TenantRule
from headrace.policy.limits import MAX_RETRY_AFTER_S, RateBucket, TenantLimits


def limits(**rule: int) -> TenantLimits:
    return TenantLimits(TenantRule("acme", **rule))  # type: ignore[arg-type]


def test_a_quiet_tenant_may_use_a_minutes_worth_at_once_and_then_one_by_one() -> None:
    acme = limits(requests_per_minute=6)
    for _ in range(6):
        assert acme.refusal(1, 0.0) is None
        acme.take(1, 1, 0.0)
    refusal = acme.refusal(1, 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.retry_after_s) == (429, "rate_limit_exceeded", 10)
    assert acme.refusal(1, 9.9) is not None
    assert acme.refusal(1, 10.0) is None


def test_a_refusal_says_which_limit_what_was_asked_and_when_to_come_again() -> None:
    acme = limits(tokens_per_minute=600)
    acme.take(1, 500, 0.0)
    refusal = acme.refusal(300, 0.0)
    assert refusal is not None
    assert refusal.message == (
        "Rate limit reached for tenant `acme` on tokens per minute: limits.tokens_per_minute is 600. This "
        "request needs about 300 tokens (prompt and answer). Try again in 20 s, or ask for a higher limit."
    )
    acme = limits(requests_per_minute=1)
    acme.take(1, 0, 0.0)
    refusal = acme.refusal(0, 0.0)
    assert refusal is not None
    assert "limits.requests_per_minute is 1. Try again in 60 s" in refusal.message


def test_tokens_are_corrected_at_the_end_and_a_debt_is_waited_for() -> None:
    acme = limits(tokens_per_minute=600)
    acme.take(1, 100, 0.0)
    acme.take(0, 700, 0.0)  # it was 800
    refusal = acme.refusal(10, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == 21
    acme.give_back(300)
    assert acme.refusal(10, 0.0) is None


def test_one_request_beyond_a_whole_minute_needs_a_full_bucket_and_is_paid_for_afterwards() -> None:
    acme = limits(tokens_per_minute=600)
    assert acme.refusal(100_000, 0.0) is None
    acme.take(1, 100_000, 0.0)
    refusal = acme.refusal(1, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == MAX_RETRY_AFTER_S
    assert acme.refusal(1, 9_941.0) is None


def test_without_limits_nothing_is_refused() -> None:
    acme = limits()
    for _ in range(1000):
        acme.take(1, 10**9, 0.0)
    assert acme.refusal(10**9, 0.0) is None
    assert acme.has_room()


def test_a_changed_limit_keeps_what_was_used_and_a_new_one_begins_full() -> None:
    bucket = RateBucket(60)
    bucket.take(50, 0.0)
    bucket.set_rate(120, 0.0)
    assert bucket.level(0.0) == 70
    bucket.set_rate(30, 0.0)
    assert bucket.level(0.0) == -20
    bucket.set_rate(0, 0.0)
    assert bucket.wait_s(1e9, 0.0) == 0
    bucket.set_rate(10, 0.0)
    assert bucket.level(0.0) == 10
    assert repr(bucket) == "<RateBucket 10.0/10>"


def test_requests_at_a_time_count_over_replicas_and_gateways() -> None:
    acme = limits(max_concurrent=3)
    acme.bind("r1")
    acme.bind("r2")
    acme.observe("r1", 2)  # one of them is another gateway's
    assert not acme.has_room()
    assert "2 bound, 1 elsewhere" in repr(acme)
    acme.free("r2")
    assert acme.has_room()
    acme.observe("r1", 1)
    assert (acme.num_bound, acme.num_elsewhere) == (1, 0)
    acme.observe("r3", 5)
    acme.observe("r3", 0)
    acme.check_integrity()


def test_the_refusal_of_too_many_waiting_names_the_limit() -> None:
    refusal = limits(max_queued=2).too_many_held("chat", 2, 7)
    assert (refusal.status, refusal.code, refusal.retry_after_s) == (429, "rate_limit_exceeded", 7)
    assert "limits.max_queued is 2" in refusal.message


@given(
    st.lists(
        st.tuples(st.floats(-1e9, 1e9), st.integers(-500, 500)),
        max_size=50,
    ),
    st.integers(1, 1000),
)
def test_no_clock_gives_more_than_a_minutes_worth_or_takes_any(
    steps: list[tuple[float, int]], per_minute: int
) -> None:
    bucket = RateBucket(per_minute)
    level = float(per_minute)
    for now_s, amount in steps:
        refilled = bucket.level(now_s)
        assert level - 1e-6 <= refilled <= per_minute
        bucket.take(amount, now_s)
        level = bucket.level(now_s)
        assert level == pytest.approx(min(per_minute, refilled - amount))
        assert bucket.wait_s(1, now_s) * per_minute / 60 <= max(0.0, 1 - level) + 1e-6


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200), st.integers(1, 600))
def test_over_any_time_no_more_than_the_rate_and_one_burst_pass(gaps: list[float], per_minute: int) -> None:
    bucket, now_s, passed = RateBucket(per_minute), 0.0, 0
    for gap in gaps:
        now_s += gap / 10
        if bucket.wait_s(1, now_s) == 0:
            bucket.take(1, now_s)
            passed += 1
    assert passed <= per_minute + now_s * per_minute / 60 + 1e-6
