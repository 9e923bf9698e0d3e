"""One window of load on a fleet: what its clients got, and the CPU that each kind of process spent on it.

Owns the generator over several addresses and the CPU samples. Must not know which fleet it is.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil
import uvloop

from benchmarks.processes import tree_of
from benchmarks.system import workload
from headrace.bench.load import LoadGenerator, LoadSpec, Progress
from headrace.bench.record import RequestRecord
from headrace.bench.statistics import percentile
from headrace.bench.target import parse_target
from headrace.bench.workload import ROUTE_PATHS
from headrace.clock import SystemClock

INPUT_TOKENS = 16
REQUEST_LIMIT_S = 60.0
TAIL_S = 0.3
REPLICA_ROLES = ("front", "engine")
GENERATOR = "generator"
IDLE = "idle fleets"
ELSEWHERE = "elsewhere"
"""Whatever else the machine does: strangers, and the kernel on its own account."""


@dataclass(frozen=True)
class Fleet:
    """Replicas and what stands before them: all processes below some roots."""

    name: str
    roots: list[int]
    role_of: Callable[[psutil.Process], str]
    """Empty: not counted by itself."""

    def members(self) -> list[tuple[str, psutil.Process]]:
        """Return (role, process) of what runs now."""
        found = [(self.role_of(process), process) for root in self.roots for process in tree_of(root)]
        return [(role, process) for role, process in found if role]


@dataclass(frozen=True)
class Stage:
    """One shape of load."""

    title: str
    streams: int
    """At a time, in a closed loop: each is followed by the next at once."""
    output_tokens: int
    is_apart: bool = False
    """Replicas have cores of their own; generator, proxies and everything else share the others."""


@dataclass
class Window:
    """What one path gave in one stretch of steady load."""

    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    """That ended within it."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """By role; the generator's and everybody else's too."""
    failures: list[str] = field(default_factory=list)
    answer_s: float = 0.0
    """From asking to the last token, by p90 of the whole run, ramp and end included."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds

    def add(self, other: Window) -> None:
        """Take another's time and what it gave in."""
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.requests += other.requests
        self.failures += other.failures
        for role, spent_s in other.cpu_s.items():
            self.cpu_s[role] = self.cpu_s.get(role, 0.0) + spent_s

    def cores(self, *roles: str) -> float:
        """Cores that these roles kept busy; without any: all together."""
        return sum(self.cpu_s.get(role, 0.0) for role in roles or self.cpu_s) / self.seconds

    def per_thousand(self, *roles: str) -> float:
        """CPU seconds of these roles per 1,000 tokens."""
        return sum(self.cpu_s.get(role, 0.0) for role in roles) * 1e3 / max(1, self.tokens)


@contextmanager
def cores_apart(fleets: Sequence[Fleet]) -> Iterator[None]:
    """Keep the replicas of all fleets on one half of the cores, and the rest of them and us on the other."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    members = [member for fleet in fleets for member in fleet.members()]
    members.append(("", psutil.Process()))
    try:
        for role, process in members:
            _pin(process, cores[half:] if role in REPLICA_ROLES else cores[:half])
        yield
    finally:
        for _, process in members:
            _pin(process, cores)


def _pin(process: psutil.Process, cores: list[int]) -> None:
    """Every thread by itself: the kernel knows no affinity of processes."""
    with suppress(psutil.Error, OSError):  # it ends, or a thread of it
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)


class CpuMeter:
    """CPU seconds by role, of one fleet, of this process and of the rest of the machine."""

    def __init__(self, fleet: Fleet, others: Sequence[Fleet]) -> None:
        # Found before the load: the search takes the generator's time.
        self._members = fleet.members()
        self._members += [(IDLE, process) for other in others for _, process in other.members()]
        self._before: dict[tuple[str, int], float] = {}

    def begin(self) -> None:
        """Count from now."""
        self._before = self._read()

    def spent_s(self) -> dict[str, float]:
        """Return what was spent by role since `begin`. A process that ended meanwhile counts for nothing."""
        spent = {GENERATOR: 0.0, IDLE: 0.0, ELSEWHERE: 0.0}
        for (role, key), now_s in self._read().items():
            if (role, key) in self._before:
                spent[role] = spent.get(role, 0.0) + now_s - self._before[role, key]
        spent[ELSEWHERE] -= sum(value for role, value in spent.items() if role != ELSEWHERE)
        return {role: max(0.0, value) for role, value in spent.items()}

    def _read(self) -> dict[tuple[str, int], float]:
        found = {(GENERATOR, 0): time.process_time(), (ELSEWHERE, 0): _machine_s()}
        for role, process in self._members:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            found[role, process.pid] = times.user + times.system
        return found


def measure(meter: CpuMeter, urls: list[str], stage: Stage, ramp_s: float, window_s: float) -> Window:
    """Load all `urls` evenly, each with its part of the streams, and return the window after the ramp."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(meter, urls, stage, ramp_s, window_s))


async def _measure(meter: CpuMeter, urls: list[str], stage: Stage, ramp_s: float, window_s: float) -> Window:
    """Every address has a generator of its own, and all are in one event loop: one client, in turns."""
    spec = LoadSpec(
        concurrency=stage.streams // len(urls),
        duration_s=ramp_s + window_s + TAIL_S,
        timeout_s=REQUEST_LIMIT_S,
    )
    targets = [parse_target(url, ROUTE_PATHS["chat"]) for url in urls]
    generators = [
        LoadGenerator(
            target,
            workload(INPUT_TOKENS, stage.output_tokens, seed=number),
            spec,
            Progress(),
            SystemClock(),
        )
        for number, target in enumerate(targets)
    ]
    running = asyncio.gather(*(generator.run() for generator in generators))
    await asyncio.sleep(ramp_s)
    meter.begin()
    start_s = time.monotonic()
    await asyncio.sleep(window_s)
    cpu_s, end_s = meter.spent_s(), time.monotonic()
    records = [record for run in await running for record in run.records]
    return Window(
        end_s - start_s,
        sum(start_s <= at_s < end_s for record in records for at_s in record.token_times),
        sum(start_s <= record.end_s < end_s and record.is_ok for record in records),
        cpu_s,
        [_describe(record) for record in records if not record.is_ok],
        percentile(sorted(record.end_to_end_s for record in records), 0.9),
    )


def _describe(record: RequestRecord) -> str:
    return f"{record.error}: {record.error_detail}"


def _machine_s() -> float:
    """CPU seconds that all cores of the machine were busy."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
