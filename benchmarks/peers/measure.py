"""One path, one window: CPU per token, times to first token, tokens per second.

A path is whatever a client may be pointed at: the bare front, headrace's gateway, a peer. Must not know
which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.processes import ForeignTree, cpu_window
from benchmarks.system import workload
from headrace.bench.load import LoadRun, LoadSpec, run_load
from headrace.bench.statistics import Summary, summarise
from headrace.bench.target import parse_target
from headrace.bench.workload import ROUTE_PATHS, Workload

REQUEST_LIMIT_S = 60.0
INPUT_TOKENS = 128
SINGLE_RATE = 40.0
"""Requests per second of a single stream: 25 ms apart, each answered within two steps."""
FIRST_TOKEN_STEP_MS = 5.0
BESIDE = "beside"
"""Role of the processes whose CPU is not on the path: engine, controller, and whoever is idle just then."""
FIRST_TOKEN_OUTPUT = 64


@dataclass(frozen=True)
class Path:
    """Where a client may ask, and whose CPU its tokens cost."""

    name: str
    url: str
    roles: tuple[str, ...]
    tree: ForeignTree | None = None


@dataclass
class Cost:
    """What was spent and received in all windows of one path."""

    window_s: float = 0.0
    tokens: int = 0
    cpu_s: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.window_s if self.window_s else 0.0

    def us_per_token(self, *roles: str) -> float:
        return sum(self.cpu_s.get(role, 0.0) for role in roles) * 1e6 / max(1, self.tokens)

    def add(self, other: Cost) -> None:
        """Take another's windows in."""
        self.window_s += other.window_s
        self.tokens += other.tokens
        for role, spent_s in other.cpu_s.items():
            self.cpu_s[role] = self.cpu_s.get(role, 0.0) + spent_s
        self.failures += other.failures


@dataclass
class FirstTokens:
    """Times to first token of one path, in seconds."""

    times_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def summary(self) -> Summary | None:
        """In milliseconds; None without samples."""
        return summarise(self.times_s, 1e3)


def measure_cost(path: Path, streams: int, num_output: int, window_s: float) -> Cost:
    """Load a path with a closed loop of `streams` and return one window of it."""
    ramp_s = min(1.0, window_s)
    spec = LoadSpec(concurrency=streams, duration_s=ramp_s + window_s + 0.3, timeout_s=REQUEST_LIMIT_S)
    with cpu_window(ramp_s, window_s, path.tree) as window:
        done, failures = _load(path.url, workload(16, num_output), spec)
    start_s, end_s = window.span_s
    tokens = sum(start_s <= at_s < end_s for record in done.records for at_s in record.token_times)
    cpu_s = {BESIDE: 0.0}
    for role, spent_s in window.spent_s().items():
        counted = role if role in path.roles else BESIDE
        cpu_s[counted] = cpu_s.get(counted, 0.0) + spent_s
    return Cost(end_s - start_s, tokens, cpu_s, failures)


def measure_first_tokens(path: Path, streams: int, round_s: float, seed: int) -> FirstTokens:
    """Load a path in an open loop, `streams` at a time on average, and return the times to first token.

    Requests come at times of their own, since a closed loop would be in step with the engine's grid, which
    then swallows what is added (see `benchmarks.gateway`).
    """
    is_single = streams == 1
    answer_s = FIRST_TOKEN_OUTPUT * FIRST_TOKEN_STEP_MS / 1e3
    spec = LoadSpec(
        rate=SINGLE_RATE if is_single else streams / answer_s,
        arrivals="fixed" if is_single else "poisson",
        duration_s=round_s,
        warmup_requests=2 * streams,  # opens the connections that peaks need
        timeout_s=REQUEST_LIMIT_S,
    )
    work = workload(INPUT_TOKENS, 2 if is_single else FIRST_TOKEN_OUTPUT, seed=seed)
    done, failures = _load(path.url, work, spec)
    times_s = [record.token_times[0] - record.sent_s for record in done.records if record.token_times]
    return FirstTokens(times_s, failures)


def in_turns(paths: list[Path], rounds: int, measure: Callable[[Path, int], None]) -> None:
    """Measure every path once per round, each round beginning with another one."""
    for number in range(rounds):
        for position in range(len(paths)):
            measure(paths[(position + number) % len(paths)], number)


def _load(url: str, work: Workload, spec: LoadSpec) -> tuple[LoadRun, list[str]]:
    """Run one load; failed requests are a peer's result, not our error."""
    run = run_load(parse_target(url, ROUTE_PATHS[work.route]), work, spec)
    failed = [record for record in run.records if not record.is_ok]
    return run, [f"{record.error}: {record.error_detail}" for record in failed]
