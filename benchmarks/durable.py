"""What a durable endpoint costs: the second front's time to first token, and its CPU time per token.

The same loads on the same simulated engine, behind a plain endpoint and behind a durable one, in turns.
"""

from __future__ import annotations

from benchmarks.gateway import INPUT_TOKENS, OUTPUT_TOKENS, SINGLE_RATE, STEP_MS
from benchmarks.processes import cpu_window
from benchmarks.report import Aim, Report, Table
from benchmarks.system import System, load, serve, simulated, workload
from headrace.bench.load import LoadSpec
from headrace.bench.statistics import Summary, summarise

STREAMS = 32
KINDS = ("plain", "durable")
ROLES = ("front", "router", "haproxy", "engine")
AIM_MS = 1.0


def run(*, is_quick: bool) -> Report:
    """Measure time to first token of single requests, then CPU time at many streams."""
    rounds, round_s, window_s = (2, 1.0, 3.0) if is_quick else (8, 4.0, 15.0)
    report = Report(
        "durable",
        "What a durable endpoint costs",
        f"Simulated engine, {STEP_MS:g} ms per step, one replica, through the gateway. Single requests: one "
        f"every {1e3 / SINGLE_RATE:g} ms finds the engine idle, {rounds} rounds of {round_s:g} s of each "
        f"kind in turns. CPU time: {STREAMS} streams in a closed loop for {window_s:g} s, of all fronts "
        "together.",
    )
    endpoint = simulated(STEP_MS, max_open=512)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with serve(endpoint) as plain_system, serve(endpoint | {"streams": {"durable": True}}) as durable_system:
        systems = dict(zip(KINDS, (plain_system, durable_system), strict=True))
        for position in range(rounds):
            for kind, system in systems.items():
                times[kind] += measure_first_tokens(system, position, round_s)
        spent = {kind: measure_cpu_us(system, window_s) for kind, system in systems.items()}
    plain, durable = (_summary(times[kind]) for kind in KINDS)
    added_ms = durable.p50 - plain.p50
    rows = [
        [kind, *(f"{value:.2f}" for value in (s.mean, s.p50, s.p99))]
        for kind, s in zip(KINDS, (plain, durable))
    ]
    report.tables.append(Table("Time to first token, ms", ("endpoint", "mean", "p50", "p99"), rows))
    rows = [[kind, *(f"{spent[kind].get(role, 0.0):.1f}" for role in ROLES)] for kind in KINDS]
    report.tables.append(Table(f"CPU µs per token at {STREAMS} streams", ("endpoint", *ROLES), rows))
    report.aims.append(
        Aim(
            "added to the first token, p50",
            f"at most {AIM_MS:g} ms",
            f"{added_ms:.2f} ms",
            added_ms <= AIM_MS,
        )
    )
    report.data |= {"added_ttft_ms": added_ms, "cpu_us_per_token": spent}
    report.caveats.append("Both systems run all the time: the one that waits costs a few reports per second.")
    return report


def measure_first_tokens(system: System, seed: int, duration_s: float) -> list[float]:
    """Return the seconds to the first token of single requests."""
    spec = LoadSpec(rate=SINGLE_RATE, arrivals="fixed", duration_s=duration_s, warmup_requests=4)
    done = load(system.url, workload(INPUT_TOKENS, 2, seed=seed), spec)
    return [record.token_times[0] - record.sent_s for record in done.records]


def measure_cpu_us(system: System, window_s: float) -> dict[str, float]:
    """Return the CPU time per token of each role, in microseconds."""
    ramp_s = 2.0
    spec = LoadSpec(concurrency=STREAMS, duration_s=ramp_s + window_s + 1, timeout_s=600)
    with cpu_window(ramp_s, window_s) as window:
        done = load(system.url, workload(INPUT_TOKENS, OUTPUT_TOKENS), spec)
    begin_s, end_s = window.span_s
    num_tokens = sum(begin_s <= at_s < end_s for record in done.records for at_s in record.token_times)
    return {role: seconds / num_tokens * 1e6 for role, seconds in window.spent_s().items()}


def _summary(times_s: list[float]) -> Summary:
    summary = summarise(times_s, 1e3)
    assert summary is not None
    return summary
