"""What HAProxy and the router add to the time to first token, straight to the front as the yardstick."""

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


def run(*, is_quick: bool) -> Report:
    """Measure at 1, 32 and 128 streams."""
    rounds, round_s = (2, 1.0) if is_quick else (8, 4.0)
    report = Report(
        "gateway",
        "Time to first token: what the gateway adds",
        f"Simulated engine, {STEP_MS:g} ms per step, one replica, chat requests of {INPUT_TOKENS} words. "
        f"Closed loops on kept connections; {rounds} rounds of {round_s:g} s each through the gateway and "
        "straight to the front, in turns (ABAB), so that the machine's moods hit both.",
    )
    rows = []
    with serve(simulated(STEP_MS, max_open=512)) as system:
        for streams in STREAMS:
            through, straight = measure(system, streams, rounds, round_s)
            added = through.p50 - straight.p50
            rows.append(
                [
                    str(streams),
                    *(f"{value:.2f}" for value in (straight.p50, straight.p99, through.p50, through.p99)),
                    f"**{added:.2f}**",
                    f"{through.p99 - straight.p99:.2f}",
                    f"{through.count} / {straight.count}",
                ]
            )
            report.data[str(streams)] = {
                "gateway_ms": msgspec.to_builtins(through),
                "front_ms": msgspec.to_builtins(straight),
            }
            if streams == 1:
                aim = f"at most {AIM_MS} ms"
                report.aims.append(Aim("added at 1 stream, p50", aim, f"{added:.2f} ms", added <= AIM_MS))
    report.tables.append(
        Table(
            "TTFT in ms",
            ("streams", "front p50", "p99", "gateway p50", "p99", "added p50", "added p99", "samples"),
            rows,
        )
    )
    report.caveats.append("Client, gateway, front and engine share the machine's cores.")
    return report


def measure(system: System, streams: int, rounds: int, round_s: float) -> tuple[Summary, Summary]:
    """Return TTFT through the gateway and straight to the front, in ms, over all rounds."""
    samples: dict[str, list[float]] = {system.url: [], system.front_urls[0]: []}
    # Short answers give many first tokens; longer ones where other streams must be in the way.
    num_output = 4 if streams == 1 else 32
    seed = time.time_ns() % 1_000_000
    for position in range(rounds):
        for url, times in samples.items():
            spec = LoadSpec(concurrency=streams, duration_s=round_s, warmup_requests=streams)
            done = load(url, workload(INPUT_TOKENS, num_output, seed=seed + position), spec)
            times += [record.ttft_s for record in done.records if record.ttft_s is not None]
    through, straight = (summarise(times, 1e3) for times in samples.values())
    assert through is not None
    assert straight is not None
    return through, straight
