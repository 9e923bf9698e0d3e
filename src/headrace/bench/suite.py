"""A benchmark as a user asks for it: one workload, one or more loads, one report.

Owns the order of runs and the report's head. Must not know terminals or argument parsing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import headrace
from headrace.bench.load import LoadSpec, Progress, run_load
from headrace.bench.results import SCHEMA_VERSION, BenchReport, RunResult, Slo, evaluate
from headrace.bench.target import Target
from headrace.bench.workload import Workload, WorkloadError
from headrace.clock import Clock, SystemClock

DEFAULT_REQUESTS_PER_WORKER = 4
DEFAULT_OPEN_DURATION_S = 30.0


def parse_concurrency(text: str) -> list[int]:
    """Read `8` or `1,4,16`. Raises WorkloadError."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1 or max(values) > 16_384:
        raise WorkloadError(f"{text!r} is not a concurrency: write 8, or a list such as 1,4,16 (1 to 16384)")
    return values


def make_specs(
    base: LoadSpec, concurrencies: Sequence[int], requests: int | None, warmup: int | None
) -> list[LoadSpec]:
    """Return one spec per run. `base` brings rate, arrivals, duration and time limit (its load is ignored
    when concurrencies are given). Without an end, a closed loop sends a few requests per worker."""
    specs = []
    for concurrency in concurrencies:
        is_endless = requests is None and base.duration_s is None
        specs.append(
            LoadSpec(
                concurrency=concurrency,
                max_requests=max(8, concurrency * DEFAULT_REQUESTS_PER_WORKER) if is_endless else requests,
                duration_s=base.duration_s,
                warmup_requests=concurrency if warmup is None else warmup,
                timeout_s=base.timeout_s,
            )
        )
    if not specs:
        specs.append(
            LoadSpec(
                rate=base.rate,
                arrivals=base.arrivals,
                max_requests=requests,
                duration_s=base.duration_s if requests or base.duration_s else DEFAULT_OPEN_DURATION_S,
                warmup_requests=4 if warmup is None else warmup,
                timeout_s=base.timeout_s,
            )
        )
    return specs


def run_suite(
    target: Target,
    workload: Workload,
    specs: Sequence[LoadSpec],
    slo: Slo,
    *,
    watch: Callable[[LoadSpec, Progress], None] = lambda spec, progress: None,
    clock: Clock | None = None,
) -> BenchReport:
    """Run the loads one after another. `watch` gets each run's live counts before it begins.

    Raises WarmupFailed when a run's warm-up fails altogether.
    """
    clock = clock or SystemClock()
    started = datetime.fromtimestamp(clock.wall_s(), UTC)
    runs: list[RunResult] = []
    for position, spec in enumerate(specs):
        progress = Progress()
        watch(spec, progress)
        # Each run gets prompts of its own: the earlier run's are in the server's prefix cache.
        own = workload.with_seed(workload.seed * 1000 + position)
        runs.append(evaluate(run_load(target, own, spec, progress=progress, clock=clock), slo))
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        headrace_version=headrace.__version__,
        started_at=started.isoformat(timespec="seconds"),
        url=target.url,
        model=workload.model,
        endpoint=workload.route,
        input_tokens=str(workload.input_tokens),
        output_tokens=str(workload.output_tokens),
        shared_prefix_tokens=workload.shared_prefix_tokens,
        ignore_eos=workload.ignore_eos,
        seed=workload.seed,
        slo=slo,
        runs=runs,
    )
