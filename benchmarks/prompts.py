"""Long prompts: how fast they are computed, what that does to running streams, what a cached prefix spares;
beside other engines in the same run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import msgspec

from benchmarks.engines.company import Company, company
from benchmarks.engines.load import REQUEST_LIMIT_S, LoadFailed, run_checked, workload_for
from benchmarks.engines.models import SMOLLM2
from benchmarks.engines.page import engines_table, failures_of, ratio
from benchmarks.engines.running import HEADRACE, RunningEngine
from benchmarks.report import Aim, Report, Table
from headrace.bench.load import LoadRun, LoadSpec
from headrace.bench.statistics import percentile

MODEL = SMOLLM2
PROMPT_TOKENS = 2_000
PREFIX_TOKENS, SUFFIX_TOKENS = 1_500, 32
NUM_STREAMS = 8
STREAM_INPUT = 64
CONTEXT_TOKENS = 2_560
MAX_RUNNING = 12
MAX_DISTURBANCE = 2.0
MAX_WARM_RATIO = 0.10
SENT_AFTER = 0.3
"""The long prompt comes when this part of the streams' undisturbed time is over."""

Figure = TypeVar("Figure")


@dataclass(frozen=True)
class Plan:
    """What is measured how often."""

    rounds: int
    stream_tokens: int
    """Per stream: they must outlast the long prompt."""
    repeat_limit_s: float


FULL = Plan(3, 192, 20.0)
QUICK = Plan(1, 64, 20.0)


class Disturbance(msgspec.Struct, frozen=True):
    """Gaps between the tokens of running streams, in milliseconds."""

    undisturbed_p50: float
    undisturbed_p99: float
    during_p50: float
    """Of the gaps that overlap the time from sending the long prompt to its first token."""
    during_p99: float
    num_during: int
    prompt_ttft_s: float
    """Of the long prompt beside the streams."""


class PrefixTimes(msgspec.Struct, frozen=True):
    """Times to first token in milliseconds."""

    cold: float
    warm: float
    """Median of those that follow with the same prefix and another end."""


@dataclass
class Figures:
    """What all turns gave, by engine."""

    prefill_s: dict[str, list[float]]
    """Time to first token of a prompt that nothing is cached of."""
    disturbance: dict[str, list[Disturbance]]
    prefix: dict[str, list[PrefixTimes]]


def run(*, is_quick: bool, only: Sequence[str] = ()) -> Report:
    """Compare with all engines that are installed, or with those named. Raises UnknownPeer."""
    plan = QUICK if is_quick else FULL
    words = ["python -m benchmarks prompts", *(["--quick"] if is_quick else [])]
    words += [f"--only {','.join(only)}"] if only else []
    report = Report("prompts", "Long prompts on the CPU", _METHOD, command=" ".join(words))
    with company(MODEL, only, CONTEXT_TOKENS, MAX_RUNNING) as together:
        figures = measure_all(together, plan)
    report.tables += [_table(figures), engines_table(MODEL, together)]
    report.aims += _aims(figures)
    report.caveats += [*failures_of(MODEL, together), *_CAVEATS]
    report.data = {
        "prefill_s": figures.prefill_s,
        "disturbance": msgspec.to_builtins(figures.disturbance),
        "prefix_ms": msgspec.to_builtins(figures.prefix),
    }
    return report


def measure_all(together: Company, plan: Plan) -> Figures:
    """Measure every engine in turns, one figure after the other."""

    def turns(what: str, measure: Callable[[RunningEngine, int], Figure]) -> dict[str, list[Figure]]:
        return together.take_turns(plan.rounds, what, measure, plan.repeat_limit_s)

    seed = time.time_ns() % 1_000_000  # no earlier run's prompts: some caches outlive it
    return Figures(
        turns("a long prompt", lambda engine, number: measure_prefill(engine, seed + number)),
        turns(
            "running streams",
            lambda engine, number: measure_disturbance(engine, seed + 100 + number, plan.stream_tokens),
        ),
        turns("a repeated prefix", lambda engine, number: measure_prefix(engine, seed + 200 + number)),
    )


def measure_prefill(engine: RunningEngine, seed: int) -> float:
    """Return the seconds from sending one long prompt to its first token. Raises LoadFailed."""
    [record] = _ask_long_prompt(engine, seed).records
    return record.token_times[0] - record.sent_s


def measure_disturbance(engine: RunningEngine, seed: int, stream_tokens: int) -> Disturbance:
    """Run the streams alone, then again with a long prompt among them. Raises LoadFailed."""
    alone = _run_streams(engine, seed, stream_tokens)
    delay_s = alone.elapsed_s * SENT_AFTER
    disturbed: list[LoadRun | Exception] = []

    def stream() -> None:
        try:
            disturbed.append(_run_streams(engine, seed + 50, stream_tokens))
        except Exception as error:  # told to whoever joins
            disturbed.append(error)

    thread = threading.Thread(target=stream, daemon=True)
    thread.start()
    try:
        time.sleep(delay_s)
        [long] = _ask_long_prompt(engine, seed).records
    finally:
        thread.join(REQUEST_LIMIT_S)
    if not disturbed or isinstance(disturbed[0], Exception):
        raise LoadFailed(f"the streams beside the long prompt: {disturbed[0] if disturbed else 'hang'}")
    sent_s, first_s = long.sent_s, long.token_times[0]
    during = sorted(gap_s for at_s, gap_s in _gaps(disturbed[0]) if at_s > sent_s and at_s - gap_s < first_s)
    if not during:
        raise LoadFailed("the streams had ended before the long prompt was sent")
    before = sorted(gap_s for _, gap_s in _gaps(alone))
    return Disturbance(
        percentile(before, 0.5) * 1e3,
        percentile(before, 0.99) * 1e3,
        percentile(during, 0.5) * 1e3,
        percentile(during, 0.99) * 1e3,
        len(during),
        first_s - sent_s,
    )


def measure_prefix(engine: RunningEngine, seed: int) -> PrefixTimes:
    """Ask four times with a prefix in common, one after another. Raises LoadFailed."""
    work = workload_for(engine, PREFIX_TOKENS + SUFFIX_TOKENS, 4, seed)
    work = replace(work, shared_prefix_tokens=PREFIX_TOKENS)
    done = run_checked(engine, work, LoadSpec(concurrency=1, max_requests=4, timeout_s=REQUEST_LIMIT_S))
    cold_ms, *warm_ms = [(record.token_times[0] - record.sent_s) * 1e3 for record in done.records]
    return PrefixTimes(cold_ms, percentile(sorted(warm_ms), 0.5))


def _ask_long_prompt(engine: RunningEngine, seed: int) -> LoadRun:
    work = workload_for(engine, PROMPT_TOKENS, 2, seed)
    return run_checked(engine, work, LoadSpec(concurrency=1, max_requests=1, timeout_s=REQUEST_LIMIT_S))


def _run_streams(engine: RunningEngine, seed: int, num_output: int) -> LoadRun:
    work = workload_for(engine, STREAM_INPUT, num_output, seed)
    spec = LoadSpec(concurrency=NUM_STREAMS, max_requests=NUM_STREAMS, timeout_s=REQUEST_LIMIT_S)
    return run_checked(engine, work, spec)


def _gaps(run: LoadRun) -> list[tuple[float, float]]:
    """Return the end and the length of each gap, in seconds, once every stream has its first token."""
    all_streaming_s = max(record.token_times[0] for record in run.records)
    return [
        (after, after - before)
        for record in run.records
        for before, after in pairwise(record.token_times)
        if before >= all_streaming_s
    ]


def _median(values: list[float]) -> float | None:
    return percentile(sorted(values), 0.5) if values else None


def _summary(figures: Figures, name: str) -> dict[str, float | None]:
    """Return one engine's medians over the rounds; None where there are none."""
    disturbed, prefixes = figures.disturbance.get(name, []), figures.prefix.get(name, [])
    prefill_s = _median(figures.prefill_s.get(name, []))
    return {
        "prefill": None if prefill_s is None else PROMPT_TOKENS / prefill_s,
        "undisturbed": _median([one.undisturbed_p99 for one in disturbed]),
        "during": _median([one.during_p99 for one in disturbed]),
        "disturbance": _median([one.during_p99 / one.undisturbed_p99 for one in disturbed]),
        "cold": _median([one.cold for one in prefixes]),
        "warm": _median([one.warm for one in prefixes]),
        "warm_ratio": _median([one.warm / one.cold for one in prefixes]),
    }


def _aims(figures: Figures) -> list[Aim]:
    ours = _summary(figures, HEADRACE)
    peers = {name: _summary(figures, name)["prefill"] for name in figures.prefill_s if name != HEADRACE}
    best = max((rate for rate in peers.values() if rate), default=None)
    rate, disturbance, warm = ours["prefill"] or 0.0, ours["disturbance"], ours["warm_ratio"]
    return [
        Aim(
            f"prefill of {PROMPT_TOKENS:,} tokens, tokens/s",
            "ahead of every peer",
            f"{rate:.0f}, {ratio(rate, best)} times the best peer's" if best else "not measured",
            best is not None and rate > best,
        ),
        Aim(
            f"ITL p99 of {NUM_STREAMS} running streams meanwhile",
            f"at most {MAX_DISTURBANCE:g} times the undisturbed",
            "not measured" if disturbance is None else f"{disturbance:.1f} times",
            disturbance is not None and disturbance <= MAX_DISTURBANCE,
        ),
        Aim(
            f"TTFT of a repeated prefix of {PREFIX_TOKENS:,} tokens",
            f"at most {MAX_WARM_RATIO:.0%} of cold",
            "not measured" if warm is None else f"{warm:.1%}",
            warm is not None and warm <= MAX_WARM_RATIO,
        ),
    ]


def _table(figures: Figures) -> Table:
    headers = (
        *("engine", "prefill tokens/s", "ITL p99 ms, undisturbed", "during the prefill", "times"),
        *("TTFT ms, cold", "repeated prefix", "ratio"),
    )
    rows = []
    for name in figures.prefill_s:
        found = _summary(figures, name)
        places = {"undisturbed": 1, "during": 1, "disturbance": 1, "warm_ratio": 3}
        cells = {
            key: "-" if value is None else f"{value:.{places.get(key, 0)}f}" for key, value in found.items()
        }
        rows.append([name, *cells.values()])
    return Table(f"{MODEL.title}: a prompt of {PROMPT_TOKENS:,} tokens", headers, rows)


_METHOD = (
    f"One prompt of {PROMPT_TOKENS:,} tokens alone: tokens over the time to its first token. {NUM_STREAMS} "
    "streams run alone, then again with such a prompt sent among them: their gaps that overlap the time "
    "from its sending to its first token are compared with the undisturbed run's. Four prompts that share "
    f"their first {PREFIX_TOKENS:,} tokens and end differently, one by one: the first is cold. Medians "
    "over the rounds; engines in turns, as in `engine`."
)
_CAVEATS = [
    "The client takes a share of the same cores.",
    "Every time to first token has the server's HTTP and tokenizer in it.",
]
