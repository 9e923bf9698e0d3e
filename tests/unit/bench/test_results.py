"""Figures from hand-made records, goodput, and the rules that make a run invalid."""

from __future__ import annotations

from array import array

import pytest

from headrace.bench.load import LoadRun, LoadSpec
from headrace.bench.record import RequestRecord
from headrace.bench.results import Slo, evaluate, invalid_reasons, meets_slo

CLOSED = LoadSpec(concurrency=2, max_requests=2)


def done(index: int, scheduled_s: float, times: list[float], *, usage: int | None = None) -> RequestRecord:
    return RequestRecord(
        index,
        scheduled_s,
        sent_s=scheduled_s,
        end_s=times[-1],
        token_times=array("d", times),
        num_prompt_tokens=None if usage is None else 10,
        num_completion_tokens=usage,
        is_done=True,
    )


def failed(index: int, kind: str, detail: str = "") -> RequestRecord:
    record = RequestRecord(index, 0.0, sent_s=0.0, end_s=1.0)
    record.fail(kind, detail)
    return record


def test_figures_of_two_requests() -> None:
    records = [done(0, 0.0, [1.0, 1.5, 2.0], usage=3), done(1, 1.0, [3.0, 4.0], usage=5)]
    result = evaluate(LoadRun(CLOSED, records, elapsed_s=4.0, client_cpu_s=0.4))
    assert (result.num_requests, result.num_ok, result.num_failed) == (2, 2, 0)
    assert (result.output_tokens, result.input_tokens, result.tokens_from) == (8, 20, "usage")
    assert (result.output_tokens_per_s, result.requests_per_s) == (2.0, 0.5)
    assert result.ttft_ms is not None
    assert (result.ttft_ms.p50, result.ttft_ms.max) == (1000.0, 2000.0)
    assert result.itl_ms is not None
    assert (result.itl_ms.count, result.itl_ms.max) == (3, 1000.0)
    assert result.tpot_ms is not None
    assert result.tpot_ms.max == pytest.approx(500.0)
    assert result.end_to_end_ms is not None
    assert result.end_to_end_ms.p99 == 3000.0
    assert result.client_cpu_ratio == pytest.approx(0.1)
    assert result.client_cpu_us_per_chunk == pytest.approx(0.4e6 / 5)
    assert result.is_valid
    assert result.goodput_per_s is None


def test_failures_are_counted_by_kind_and_kept_out_of_latencies() -> None:
    records = [
        done(0, 0.0, [1.0, 2.0]),
        failed(1, "http_500", "first"),
        failed(2, "http_500"),
        failed(3, "cut"),
    ]
    result = evaluate(LoadRun(CLOSED, records, 2.0, 0.0), Slo(ttft_ms=2000))
    assert result.errors == {"cut": 1, "http_500": 2}
    assert result.error_examples["http_500"] == "first"
    assert result.ttft_ms is not None
    assert result.ttft_ms.count == 1
    assert result.goodput_ratio == 0.25
    assert result.goodput_per_s == 0.5
    assert result.tokens_from == "chunks"


def test_a_run_without_success_is_invalid() -> None:
    result = evaluate(LoadRun(CLOSED, [failed(0, "connect", "refused")], 1.0, 0.0))
    assert not result.is_valid
    assert result.invalid_reasons == ["no request succeeded"]


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        (Slo(), True),
        (Slo(ttft_ms=1000), True),
        (Slo(ttft_ms=999), False),
        (Slo(itl_ms=500), True),
        (Slo(itl_ms=499), False),
        (Slo(ttft_ms=1000, itl_ms=100), False),
    ],
)
def test_goodput_needs_every_part_of_the_slo(slo: Slo, is_met: bool) -> None:
    assert meets_slo(done(0, 0.0, [1.0, 1.5, 2.0]), slo) is is_met


def test_one_long_gap_in_a_hundred_is_forgiven_two_are_not() -> None:
    def with_long_gaps(count: int) -> RequestRecord:
        times = [1.0]
        for position in range(100):
            times.append(times[-1] + (1.0 if position < count else 0.01))
        return done(0, 0.0, times)

    assert meets_slo(with_long_gaps(1), Slo(itl_ms=50))
    assert not meets_slo(with_long_gaps(2), Slo(itl_ms=50))


@pytest.mark.parametrize(
    ("rate", "lag_s", "is_valid"),
    [
        (100.0, 0.0099, True),  # the mean gap is 10 ms: the 10 ms floor counts
        (100.0, 0.0101, False),
        (1.0, 0.099, True),  # the mean gap is 1 s: a tenth of it counts
        (1.0, 0.101, False),
    ],
)
def test_an_open_loop_that_sends_late_is_invalid(rate: float, lag_s: float, is_valid: bool) -> None:
    spec = LoadSpec(rate=rate, max_requests=1)
    reasons = invalid_reasons(spec, [done(0, 0.0, [1.0])], [lag_s], 0.1)
    assert (not reasons) is is_valid
    if reasons:
        assert "sent late" in reasons[0]


def test_one_late_request_in_a_hundred_is_forgiven() -> None:
    spec = LoadSpec(rate=10.0, max_requests=100)
    assert invalid_reasons(spec, [done(0, 0.0, [1.0])], [0.0] * 99 + [5.0], 0.1) == []
    assert invalid_reasons(spec, [done(0, 0.0, [1.0])], [0.0] * 98 + [5.0] * 2, 0.1) != []


def test_a_saturated_client_makes_any_run_invalid() -> None:
    record = [done(0, 0.0, [1.0])]
    assert invalid_reasons(CLOSED, record, [0.0], 0.85) == []
    assert "saturated" in invalid_reasons(CLOSED, record, [0.0], 0.86)[0]


def test_requests_that_the_client_could_not_send_make_a_run_invalid() -> None:
    records = [done(0, 0.0, [1.0]), failed(1, "client_limit")]
    assert "want of connections" in invalid_reasons(CLOSED, records, [0.0, 0.0], 0.1)[0]
