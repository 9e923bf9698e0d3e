"""From the records of a run to its figures, and whether they may be believed. Pure.

Owns the figures' definitions, goodput, and the rules that make a run invalid. The structs are the JSON schema
of `headrace bench --json`: add fields, never rename them. Must not know sockets or terminals.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

from headrace.bench.load import LoadRun, LoadSpec
from headrace.bench.record import ErrorKind, RequestRecord
from headrace.bench.statistics import Summary, percentile, summarise

SCHEMA_VERSION = 1
MAX_CLIENT_CPU_RATIO = 0.85
"""Above this share of one core the client may have delayed what it measured."""
MIN_SEND_LAG_S = 0.010
MAX_SEND_LAG_GAP_RATIO = 0.10


class Slo(msgspec.Struct, frozen=True):
    """What a good request is. None: no limit. ITL holds when 99% of the request's gaps are within it."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None


class RunResult(msgspec.Struct, frozen=True):
    """One run's figures. Latencies are of the requests that succeeded, from their scheduled times."""

    mode: Literal["closed", "open"]
    concurrency: int
    """Of a closed loop; 0 else."""
    rate: float
    """Requests per second of an open loop; 0 else."""
    arrivals: str
    num_requests: int
    num_ok: int
    num_failed: int
    errors: dict[str, int]
    """Failures by kind."""
    error_examples: dict[str, str]
    """The first message of each kind."""
    elapsed_s: float
    """From the first scheduled time to the last end."""
    requests_per_s: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    tokens_from: Literal["usage", "chunks", "mixed"]
    """Where token counts come from: the server's usage, or counted chunks (input tokens are then unknown)."""
    ttft_ms: Summary | None
    itl_ms: Summary | None
    tpot_ms: Summary | None
    end_to_end_ms: Summary | None
    send_lag_ms: Summary | None
    """Scheduled time to the client's coming to send it."""
    goodput_per_s: float | None
    """Requests per second that met the SLO; None without one."""
    goodput_ratio: float | None
    """Of all requests, failed ones included."""
    num_chunks: int
    client_cpu_ratio: float
    """The client's CPU time, as a share of one core."""
    client_cpu_us_per_chunk: float
    is_valid: bool
    invalid_reasons: list[str]


class BenchReport(msgspec.Struct, frozen=True):
    """What `headrace bench --json` writes."""

    schema_version: int
    headrace_version: str
    started_at: str
    """UTC, ISO 8601."""
    url: str
    model: str
    endpoint: str
    input_tokens: str
    output_tokens: str
    shared_prefix_tokens: int
    ignore_eos: bool
    seed: int
    slo: Slo
    runs: list[RunResult]


def evaluate(run: LoadRun, slo: Slo | None = None) -> RunResult:
    """Compute a run's figures."""
    slo = slo or Slo()
    spec, records = run.spec, run.records
    done = [record for record in records if record.is_ok]
    failed = [record for record in records if not record.is_ok]
    elapsed_s = run.elapsed_s
    num_chunks = sum(len(record.token_times) for record in records)
    num_good = sum(meets_slo(record, slo) for record in done) if slo.is_set else None
    lags_s = [record.sent_s - record.scheduled_s for record in records]
    cpu_ratio = run.client_cpu_s / elapsed_s if elapsed_s > 0 else 0.0
    output_tokens = sum(record.num_output_tokens for record in done)
    input_tokens = sum(record.num_prompt_tokens or 0 for record in done)
    reasons = invalid_reasons(spec, records, lags_s, cpu_ratio)
    return RunResult(
        mode="closed" if spec.concurrency else "open",
        concurrency=spec.concurrency,
        rate=spec.rate,
        arrivals="" if spec.concurrency else spec.arrivals,
        num_requests=len(records),
        num_ok=len(done),
        num_failed=len(failed),
        errors=dict(sorted(Counter(record.error for record in failed).items())),
        error_examples={record.error: record.error_detail for record in reversed(failed)},
        elapsed_s=elapsed_s,
        requests_per_s=_per_second(len(done), elapsed_s),
        input_tokens=input_tokens,
        cached_tokens=sum(record.num_cached_tokens or 0 for record in done),
        output_tokens=output_tokens,
        input_tokens_per_s=_per_second(input_tokens, elapsed_s),
        output_tokens_per_s=_per_second(output_tokens, elapsed_s),
        tokens_from=_tokens_from(done),
        ttft_ms=summarise((r.ttft_s for r in done if r.ttft_s is not None), 1e3),
        itl_ms=summarise((gap for r in done for gap in r.gaps_s()), 1e3),
        tpot_ms=summarise((r.tpot_s for r in done if r.tpot_s is not None), 1e3),
        end_to_end_ms=summarise((r.end_to_end_s for r in done), 1e3),
        send_lag_ms=summarise(lags_s, 1e3),
        goodput_per_s=None if num_good is None else _per_second(num_good, elapsed_s),
        goodput_ratio=None if num_good is None else num_good / max(1, len(records)),
        num_chunks=num_chunks,
        client_cpu_ratio=cpu_ratio,
        client_cpu_us_per_chunk=run.client_cpu_s * 1e6 / num_chunks if num_chunks else 0.0,
        is_valid=not reasons,
        invalid_reasons=reasons,
    )


def meets_slo(record: RequestRecord, slo: Slo) -> bool:
    """Whether a request that succeeded met the SLO. Without any text it met no TTFT."""
    if slo.ttft_ms is not None and (record.ttft_s is None or record.ttft_s * 1e3 > slo.ttft_ms):
        return False
    if slo.itl_ms is not None:
        gaps = sorted(record.gaps_s())
        return not gaps or percentile(gaps, 0.99) * 1e3 <= slo.itl_ms
    return True


def invalid_reasons(
    spec: LoadSpec, records: list[RequestRecord], lags_s: list[float], client_cpu_ratio: float
) -> list[str]:
    """Return why a run's figures are not to be believed: one sentence per reason, none for a valid run."""
    reasons = []
    if not any(record.is_ok for record in records):
        reasons.append("no request succeeded")
    if spec.rate and lags_s:
        lag_s = percentile(sorted(lags_s), 0.99)
        limit_s = max(MIN_SEND_LAG_S, MAX_SEND_LAG_GAP_RATIO / spec.rate)
        if lag_s > limit_s:
            reasons.append(
                f"the client sent late: p99 lag {lag_s * 1e3:.1f} ms, "
                f"at most {limit_s * 1e3:.1f} ms is allowed; "
                "lower the rate, or run the client on a machine with free cores"
            )
    if client_cpu_ratio > MAX_CLIENT_CPU_RATIO:
        reasons.append(
            f"the client was saturated: {client_cpu_ratio:.0%} of one core, "
            f"at most {MAX_CLIENT_CPU_RATIO:.0%} is allowed; lower the load, or run several clients"
        )
    num_unsent = sum(record.error == ErrorKind.CLIENT_LIMIT for record in records)
    if num_unsent:
        reasons.append(f"{num_unsent} requests were not sent for want of connections; raise `ulimit -n`")
    return reasons


def _per_second(count: float, elapsed_s: float) -> float:
    return count / elapsed_s if elapsed_s > 0 else 0.0


def _tokens_from(done: list[RequestRecord]) -> Literal["usage", "chunks", "mixed"]:
    num_with_usage = sum(record.num_completion_tokens is not None for record in done)
    if not num_with_usage:
        return "chunks"
    return "usage" if num_with_usage == len(done) else "mixed"
