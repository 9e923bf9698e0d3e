"""What HAProxy and the router add to the time to first token, straight to the front as the yardstick.

While the simulated engine is busy its steps lie on a grid, and a request waits for the next line of it.
A client that asks again the moment its answer ends is always in step with that grid, which swallows up to a
whole step of added latency. So requests come at times of their own: one stream with pauses in which the
engine falls idle, many streams as a Poisson process.
"""

from __future__ import annotations

import time

import msgspec

from benchmarks.report import Aim, Report, Table
from benchmarks.system import System, load, serve, simulated, workload
from headrace.bench.load import LoadSpec
from headrace.bench.statistics import Summary, summarise

STEP_MS = 5.0
STREAMS = (1, 32, 128)
AIM_MS = 0.5
INPUT_TOKENS = 128
OUTPUT_TOKENS = 64
SINGLE_RATE = 40.0
"""Requests per second of a single stream: 25 ms apart, each answered within two steps."""


def run(*, is_quick: bool) -> Report:
    """Measure at 1, 32 and 128 streams."""
    rounds, round_s = (2, 1.0) if is_quick else (8, 4.0)
    report = Report(
        "gateway",
        "Time to first token: what the gateway adds",
        f"Simulated engine, {STEP_MS:g} ms per step, one replica, chat requests of {INPUT_TOKENS} words. "
        f"Open loops on kept connections: one stream asks every {1e3 / SINGLE_RATE:g} ms and finds the "
        "engine idle; more streams are that many on average, with Poisson arrivals. Latency counts from the "
        "sending. "
        f"{rounds} rounds of {round_s:g} s each through the gateway and straight to the front, with the same "
        "arrivals, in turns (ABAB), so that the machine's moods hit both.",
    )
    rows = []
    with serve(simulated(STEP_MS, max_open=512)) as system:
        for streams in STREAMS:
            through, straight = measure(system, streams, rounds, round_s)
            added = through.p50 - straight.p50
            rows.append(
                [
                    str(streams),
                    *(f"{value:.2f}" for value in (straight.mean, straight.p50, straight.p99)),
                    *(f"{value:.2f}" for value in (through.mean, through.p50, through.p99)),
                    f"{through.mean - straight.mean:.2f}",
                    f"**{added:.2f}**",
                    f"{through.p99 - straight.p99:.2f}",
                    f"{through.count}",
                ]
            )
            report.data[str(streams)] = {
                "gateway_ms": msgspec.to_builtins(through),
                "front_ms": msgspec.to_builtins(straight),
            }
            if streams == 1:
                aim = f"at most {AIM_MS} ms"
                report.aims.append(Aim("added at 1 stream, p50", aim, f"{added:.2f} ms", added <= AIM_MS))
    headers = ("streams", "front mean", "p50", "p99", "gateway mean", "p50", "p99")
    added_headers = ("added mean", "added p50", "added p99", "samples each")
    report.tables.append(Table("TTFT in ms", (*headers, *added_headers), rows))
    report.caveats += [
        "Client, gateway, front and engine share the machine's cores; 128 streams are 25,600 tokens/s.",
        f"With many streams TTFT is one step and the wait for it: {STEP_MS:g} to {2 * STEP_MS:g} ms. "
        "Differences of p50 below about 0.1 ms are noise there.",
    ]
    return report


def measure(system: System, streams: int, rounds: int, round_s: float) -> tuple[Summary, Summary]:
    """Return TTFT through the gateway and straight to the front, in ms, over all rounds."""
    samples: dict[str, list[float]] = {system.url: [], system.front_urls[0]: []}
    num_output = 2 if streams == 1 else OUTPUT_TOKENS
    seed = time.time_ns() % 1_000_000
    for position in range(rounds):
        for url, times in samples.items():
            spec = LoadSpec(
                rate=SINGLE_RATE if streams == 1 else streams / (OUTPUT_TOKENS * STEP_MS / 1e3),
                arrivals="fixed" if streams == 1 else "poisson",
                duration_s=round_s,
                warmup_requests=2 * streams,  # opens the connections that peaks need
            )
            done = load(url, workload(INPUT_TOKENS, num_output, seed=seed + position), spec)
            times += [record.token_times[0] - record.sent_s for record in done.records]
    through, straight = (summarise(times, 1e3) for times in samples.values())
    assert through is not None
    assert straight is not None
    return through, straight
