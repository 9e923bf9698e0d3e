"""Counts of ended requests: complete, and bounded in labels."""

from __future__ import annotations

import msgspec

from headrace.observability.request_record import RequestRecord
from headrace.observability.request_statistics import MAX_TENANTS, OTHER, RequestStatistics

NOTHING = RequestRecord(
    **dict.fromkeys(RequestRecord.__struct_fields__, ""),  # type: ignore[arg-type]
)
RECORD = msgspec.structs.replace(
    NOTHING,
    endpoint="chat",
    state="finished",
    status=200,
    held_ms=20.0,
    ttft_ms=300.0,
    total_ms=2000,
    prompt_tokens=10,
    cached_tokens=4,
    output_tokens=6,
    engine_ms=250.0,
)


def test_tenants_beyond_the_bound_are_counted_together() -> None:
    statistics = RequestStatistics()
    for number in range(MAX_TENANTS + 50):
        statistics.observe(msgspec.structs.replace(RECORD, tenant=f"t{number}"))
    assert len(statistics.totals) == MAX_TENANTS + 1
    assert statistics.totals["chat", OTHER].ended == {"finished": 50}
    assert statistics.totals["chat", OTHER].engine_s == 50 * 0.25
    assert sum(totals.output_tokens for totals in statistics.totals.values()) == 6 * (MAX_TENANTS + 50)


def test_durations_count_what_is_known() -> None:
    statistics = RequestStatistics()
    statistics.observe(RECORD)
    refused = {
        "state": "refused",
        "status": 503,
        "code": "queue_full",
        "ttft_ms": None,
        "output_tokens": None,
    }
    statistics.observe(msgspec.structs.replace(RECORD, **refused))
    durations = statistics.durations["chat"]
    assert [sum(histogram.counts) for histogram in (durations.queue_time, durations.time_to_first_token)] == [
        2,
        1,
    ]
    assert (sum(durations.e2e_latency.counts), durations.e2e_latency.total) == (1, 2.0)
    assert statistics.statuses == {("chat", 200): 1, ("chat", 503): 1}
    assert statistics.refusals == {("chat", "queue_full"): 1}
    assert statistics.totals["chat", ""].prompt_tokens == 10
