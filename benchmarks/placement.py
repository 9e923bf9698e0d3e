"""Prefix placement beside round robin and least loaded: prompt tokens computed again, time to first token.

Four replicas of the simulated engine, whose prompts cost time unless the real prefix cache holds them, and
whose KV memory cannot hold every prefix. Open loops of the same arrivals at a rate near saturation: all three
placements answer the same requests in the same time, so goodput is equal and the times tell.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import Aim, Report, Table
from benchmarks.system import ENDPOINT, MODEL, load, serve
from headrace.bench.load import LoadSpec
from headrace.bench.record import RequestRecord
from headrace.bench.statistics import summarise
from headrace.bench.workload import Lengths, Workload

PLACEMENTS = ("round_robin", "least_loaded", "prefix")
SHARES = (0.0, 0.3, 0.6, 0.9)
SKEWS = {"uniform": 0.0, "Zipf": 1.0}
REPLICAS = 4
STEP_MS = 5.0
PREFILL_MS_PER_TOKEN = 0.02
KV_MB = 24
"""24,576 tokens per replica: about 12 prompts, half of the shared prefixes at a share of 0.9."""
PROMPT_WORDS = 350
"""About 2,000 tokens: the simulated engine's tokens are bytes."""
OUTPUT_TOKENS = 32
NUM_GROUPS = 24
RATE = 46.0
"""About 70% of what four replicas can do when nothing is cached (a prompt takes four steps, 60 ms)."""
WIN_FROM = 0.3
MAX_LOSS = 0.03


@dataclass(frozen=True)
class Figures:
    """One placement at one point of the sweep."""

    recomputed: float
    """Part of all prompt tokens that was computed, 0 to 1."""
    p50_ms: float
    p90_ms: float
    goodput: float
    """Answered requests per second."""


@dataclass(frozen=True)
class Sample:
    """One round of one placement."""

    records: list[RequestRecord]
    elapsed_s: float


def run(*, is_quick: bool) -> Report:
    """Sweep the shared part of the prompts and how unevenly the prefixes are asked for."""
    shares = (0.0, 0.6) if is_quick else SHARES
    rounds, settle_s, measure_s = (1, 1.0, 2.5) if is_quick else (2, 1.5, 3.3)
    report = Report(
        "placement",
        "Prefix placement",
        f"{REPLICAS} replicas, simulated engine: {STEP_MS:g} ms per step of at most 512 tokens and "
        f"{PREFILL_MS_PER_TOKEN:g} ms per uncached prompt token, {KV_MB * 1024:,} tokens of KV memory "
        f"each. Prompts of {PROMPT_WORDS} words (about 2,000 tokens), {OUTPUT_TOKENS} tokens out; the first "
        f"part of each prompt is one of {NUM_GROUPS} shared prefixes. Poisson arrivals, {RATE:g}/s, the same "
        f"for each placement. {rounds} rounds of {measure_s:g} s after {settle_s:g} s that fill the caches, "
        "the three systems in turns, so that the machine's moods hit all.",
    )
    points: dict[Any, dict[str, Figures]] = {(share, skew): {} for share in shares for skew in SKEWS}
    with ExitStack() as stack:
        urls = {kind: stack.enter_context(serve(endpoint(kind))).url for kind in PLACEMENTS}
        for number, (share, skew) in enumerate(points):
            samples: dict[str, list[Sample]] = {placement: [] for placement in PLACEMENTS}
            for turn in range(rounds):
                work = workload(share, SKEWS[skew], seed=100 * turn + number)
                for placement in PLACEMENTS:
                    samples[placement].append(measure(urls[placement], work, settle_s, measure_s))
            points[share, skew] = {placement: figures_of(some) for placement, some in samples.items()}
    rows = []
    for (share, skew), figures in points.items():
        for placement in PLACEMENTS:
            one = figures[placement]
            figures_text = (f"{one.p50_ms:.1f}", f"{one.p90_ms:.1f}", f"{one.goodput:.1f}")
            rows.append([f"{share:.0%}", skew, placement, f"{one.recomputed:.3f}", *figures_text])
            report.data[f"{share:g} {skew} {placement}"] = asdict(one)
    headers = ("shared", "skew", "placement", "tokens computed", "TTFT p50 ms", "p90 ms", "requests/s")
    report.tables.append(Table("The sweep", headers, rows))
    report.tables.append(ratio_table(points))
    report.aims += aims(points)
    report.caveats += [
        "At a share of 0 there is nothing to find; what remains is how evenly work is spread. For requests "
        "of equal size round robin is the best there can be: it needs no reports, which are up to 50 ms old.",
        "Client and all processes of the three systems share the machine's cores; the engines mostly sleep.",
    ]
    return report


def endpoint(placement: str) -> dict[str, Any]:
    """Return the endpoint's section of the config."""
    return {
        "model": MODEL,
        "engine": "simulated",
        "replicas": REPLICAS,
        "placement": placement,
        "simulated": {"step_ms": STEP_MS, "prefill_ms_per_token": PREFILL_MS_PER_TOKEN},
        "native": {"max_running": 32, "kv_cache_mb": KV_MB},
        "max_open": 256,
    }


def workload(share: float, skew: float, seed: int) -> Workload:
    return Workload(
        ENDPOINT,
        input_tokens=Lengths("fixed", PROMPT_WORDS),
        output_tokens=Lengths("fixed", OUTPUT_TOKENS),
        shared_prefix_tokens=round(PROMPT_WORDS * share),
        num_groups=NUM_GROUPS,
        group_skew=skew,
        ignore_eos=True,
        seed=seed,
    )


def measure(url: str, work: Workload, settle_s: float, measure_s: float) -> Sample:
    """Load the system; what was sent in the first settle_s fills the caches and is not counted."""
    done = load(url, work, LoadSpec(rate=RATE, duration_s=settle_s + measure_s, warmup_requests=4))
    start_s = min(record.scheduled_s for record in done.records) + settle_s
    records = [record for record in done.records if record.scheduled_s >= start_s]
    return Sample(records, max(record.end_s for record in records) - start_s)


def figures_of(samples: list[Sample]) -> Figures:
    records = [record for sample in samples for record in sample.records]
    times = summarise([record.token_times[0] - record.scheduled_s for record in records], 1e3)
    assert times is not None
    total = sum(record.num_prompt_tokens or 0 for record in records)
    cached = sum(record.num_cached_tokens or 0 for record in records)
    elapsed_s = sum(sample.elapsed_s for sample in samples)
    return Figures(1 - cached / total, times.p50, times.p90, len(records) / elapsed_s)


def ratio_table(points: dict[Any, dict[str, Figures]]) -> Table:
    """Return prefix placement relative to the better of the other two, figure by figure."""
    rows = []
    for (share, skew), figures in points.items():
        ratios = [ratio(figures, name) for name in ("recomputed", "p50_ms", "p90_ms")]
        rows.append([f"{share:.0%}", skew, *(f"**{value:.2f}**" for value in ratios)])
    headers = ("shared", "skew", "prompt tokens computed", "TTFT p50", "TTFT p90")
    return Table("Prefix placement relative to the better of the others (below 1: wins)", headers, rows)


def ratio(figures: dict[str, Figures], name: str) -> float:
    others = [getattr(figures[placement], name) for placement in PLACEMENTS if placement != "prefix"]
    return float(getattr(figures["prefix"], name) / min(others))


def aims(points: dict[Any, dict[str, Figures]]) -> list[Aim]:
    names = ("recomputed", "p50_ms", "p90_ms")
    ratios = {(point, name): ratio(figures, name) for point, figures in points.items() for name in names}
    worst = max(ratios, key=lambda key: ratios[key])
    (share, skew), name = worst
    shared = {key: value for key, value in ratios.items() if key[0][0] >= WIN_FROM}
    weakest = max(shared, key=lambda key: shared[key])
    return [
        Aim(
            f"prefix placement from a share of {WIN_FROM:.0%} on",
            "wins in tokens, p50 and p90 at every point",
            f"weakest: {shared[weakest]:.2f} ({weakest[1]} at {weakest[0][0]:.0%}, {weakest[0][1]})",
            shared[weakest] < 1.0,
        ),
        Aim(
            "prefix placement anywhere",
            f"never loses more than {MAX_LOSS:.0%} to the better of the others",
            f"worst: {ratios[worst]:.2f} ({name} at {share:.0%}, {skew})",
            ratios[worst] <= 1 + MAX_LOSS,
        ),
    ]
