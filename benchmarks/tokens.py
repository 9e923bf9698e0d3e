"""CPU per streamed token of each process on the path, and throughput beside the bare front."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.processes import cpu_window
from benchmarks.report import Aim, Report, Table
from benchmarks.system import load, serve, simulated, workload
from headrace.bench.load import LoadSpec

TOKENS_PER_S = 20_000
OUTPUT_TOKENS = {64: 512, 512: 128}
"""Streams -> tokens per answer: a few seconds each, so that a load ends soon after its window."""
AIM_US = 15.0
GATEWAY = "gateway"
GATEWAY_HTTP1 = "gateway, HTTP/1.1 to the front"
ROLES = ("haproxy", "front", "router", "engine", "controller")


@dataclass
class Cost:
    """What was spent in all windows of one path."""

    window_s: float = 0.0
    tokens: int = 0
    cpu_s: dict[str, float] | None = None
    client_cpu_us: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.window_s

    def us_per_token(self, *roles: str) -> float:
        return sum((self.cpu_s or {}).get(role, 0.0) for role in roles) * 1e6 / max(1, self.tokens)


def run(*, is_quick: bool) -> Report:
    """Measure at 64 and 512 streams, 20,000 tokens per second each."""
    rounds, window_s = (1, 2.0) if is_quick else (3, 10.0)
    report = Report(
        "tokens",
        "CPU per streamed token",
        f"Simulated engine whose steps are as long as gives {TOKENS_PER_S:,} tokens/s, one replica, closed "
        f"loop, answers of 128 to 512 tokens. {rounds} windows of {window_s:g} s per path, in turns (ABAB), "
        "each in a system of its own: with HTTP/2 between HAProxy and front, as by default for such streams, "
        "and with HTTP/1.1. "
        "CPU is the processes' own user and system time in the window; tokens are what the client got in it.",
    )
    rows = []
    for streams in OUTPUT_TOKENS:
        costs = {name: Cost() for name in (GATEWAY, GATEWAY_HTTP1, "front alone")}
        for _ in range(rounds):
            for name, protocol in ((GATEWAY, "h2"), (GATEWAY_HTTP1, "http1")):
                engine = simulated(streams * 1e3 / TOKENS_PER_S, max_open=1024)
                with serve(engine, replica_protocol=protocol) as system:
                    measure(system.url, streams, window_s, costs[name])
                    if protocol == "http1":
                        measure(system.front_urls[0], streams, window_s, costs["front alone"])
        bare = costs["front alone"].tokens_per_s
        for name, cost in costs.items():
            rows.append(
                [
                    str(streams),
                    name,
                    f"{cost.tokens_per_s:,.0f}",
                    f"{cost.tokens_per_s / bare:.3f}",
                    *(f"{cost.us_per_token(role):.1f}" for role in ROLES),
                    f"**{cost.us_per_token('haproxy', 'front'):.1f}**",
                    f"{cost.client_cpu_us:.1f}",
                ]
            )
            report.data[f"{streams} streams, {name}"] = {
                "tokens_per_s": cost.tokens_per_s,
                "cpu_us_per_token": {role: cost.us_per_token(role) for role in sorted(cost.cpu_s or {})},
                "client_cpu_us_per_chunk": cost.client_cpu_us,
            }
        spent = costs[GATEWAY].us_per_token("haproxy", "front")
        report.aims.append(
            Aim(
                f"HAProxy + front, {streams} streams",
                f"at most {AIM_US:g} µs",
                f"{spent:.1f} µs",
                spent <= AIM_US,
            )
        )
    report.tables.append(
        Table(
            "CPU µs per token",
            ("streams", "path", "tokens/s", "of bare", *ROLES, "HAProxy + front", "client"),
            rows,
        )
    )
    report.caveats += [
        "The kernel's share of loopback TCP is counted to whoever makes the system call.",
        "One token per chunk; CPU times have a resolution of 10 ms per process.",
    ]
    return report


def measure(url: str, streams: int, window_s: float, cost: Cost) -> None:
    """Add one window of load on `url` to `cost`."""
    ramp_s = 1.0
    # As many tokens as the window and its margins need, so that the load outlasts it.
    spec = LoadSpec(concurrency=streams, duration_s=ramp_s + window_s + 0.5)
    with cpu_window(ramp_s, window_s) as window:
        done = load(url, workload(16, OUTPUT_TOKENS[streams]), spec)
    start_s, end_s = window.span_s
    cost.tokens += sum(start_s <= at_s < end_s for record in done.records for at_s in record.token_times)
    cost.window_s += end_s - start_s
    cost.cpu_s = cost.cpu_s or {}
    for role, spent_s in window.spent_s().items():
        cost.cpu_s[role] = cost.cpu_s.get(role, 0.0) + spent_s
    num_chunks = sum(len(record.token_times) for record in done.records)
    cost.client_cpu_us = done.client_cpu_s * 1e6 / max(1, num_chunks)
