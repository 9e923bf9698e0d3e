"""Runs load against a target: closed loop (so many at a time) or open loop (so many per second).

Owns the run: warm-up, sending, time limits, the client's own cost. Must not know how results are shown.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import uvloop

from headrace.bench.connection import ConnectionPool
from headrace.bench.pacing import OpenLoopSchedule
from headrace.bench.record import RequestRecord
from headrace.bench.target import Target
from headrace.bench.workload import Arrivals, Workload, arrival_times
from headrace.clock import Clock, SystemClock
from headrace.errors import HeadraceError

MAX_OPEN = 16_384
_RESERVED_FILES = 64
_LEAD_S = 0.05
"""From the start of an open loop to its first request."""


class WarmupFailed(HeadraceError):
    """Every warm-up request failed: measuring would be pointless."""


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """How one run loads the target: `concurrency` requests at a time, or `rate` per second."""

    concurrency: int = 0
    rate: float = 0.0
    arrivals: Arrivals = "poisson"
    max_requests: int | None = None
    """Most measured requests; None: until duration_s."""
    duration_s: float | None = None
    """How long requests are sent; those open at the end are waited for."""
    warmup_requests: int = 0
    """Sent before, and not measured: as many at a time as the load, in an open loop all at once."""
    timeout_s: float = 300.0
    """Longest time for one request."""

    def __post_init__(self) -> None:
        assert (self.concurrency > 0) != (self.rate > 0), "either a concurrency or a rate"
        assert self.max_requests is not None or self.duration_s is not None, "a run needs an end"


@dataclass(slots=True)
class Progress:
    """Live counts of a run, for those who watch it. Written by the run only."""

    phase: str = "warm-up"
    num_sent: int = 0
    num_ended: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    """Of ended requests."""
    num_wanted: int | None = None
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What a run measured."""

    spec: LoadSpec
    records: list[RequestRecord] = field(repr=False)
    elapsed_s: float
    """From the first scheduled time to the last end."""
    client_cpu_s: float
    """CPU time of the thread that sent and received, over `elapsed_s`."""


def run_load(
    target: Target,
    workload: Workload,
    spec: LoadSpec,
    *,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> LoadRun:
    """Run one load in the calling thread, in an event loop of its own, until its end."""
    generator = LoadGenerator(target, workload, spec, progress or Progress(), clock or SystemClock())
    return run_in_loop(generator.run())


def run_in_loop(main: Coroutine[Any, Any, LoadRun]) -> LoadRun:
    """Run a coroutine on a fresh uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


class LoadGenerator:
    """One run against one target."""

    def __init__(
        self, target: Target, workload: Workload, spec: LoadSpec, progress: Progress, clock: Clock
    ) -> None:
        self._workload = workload
        self._spec = spec
        self._progress = progress
        self._now_s: Callable[[], float] = clock.now_s
        self._records: list[RequestRecord] = []
        self._pool = ConnectionPool(
            target, self._now_s, timeout_s=spec.timeout_s, max_open=min(MAX_OPEN, raise_file_limit())
        )

    async def run(self) -> LoadRun:
        """Warm up, load, wait for the last answer."""
        spec = self._spec
        try:
            await self._warm_up()
            self._begin()
            cpu_s = time.thread_time()
            if spec.concurrency:
                await self._run_closed(spec.concurrency, self._indices(), spec.duration_s)
            else:
                await self._run_open()
            cpu_s = time.thread_time() - cpu_s
        finally:
            self._pool.close()
            gc.unfreeze()
        first_s = min((record.scheduled_s for record in self._records), default=0.0)
        last_s = max((record.end_s for record in self._records), default=0.0)
        return LoadRun(spec, self._records, last_s - first_s, cpu_s)

    async def _warm_up(self) -> None:
        num = self._spec.warmup_requests
        await self._run_closed(min(num, self._spec.concurrency or num), iter(range(-num, 0)), None)
        failed = [record for record in self._records if not record.is_ok]
        if failed and len(failed) == num:
            raise WarmupFailed(
                f"All {num} warm-up requests failed. The first: {failed[0].error}: {failed[0].error_detail}"
            )
        self._records = []

    def _begin(self) -> None:
        progress, spec = self._progress, self._spec
        progress.phase = "measuring"
        progress.num_sent = progress.num_ended = progress.num_failed = progress.num_tokens = 0
        progress.num_wanted = spec.max_requests
        progress.start_s = self._now_s()
        # What exists now is not garbage: later collections need not look at it.
        gc.collect()
        gc.freeze()

    def _indices(self) -> Iterator[int]:
        return count() if self._spec.max_requests is None else iter(range(self._spec.max_requests))

    async def _run_closed(self, concurrency: int, indices: Iterator[int], duration_s: float | None) -> None:
        until_s = None if duration_s is None else self._now_s() + duration_s
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._work(indices, until_s))

    async def _work(self, remaining: Iterator[int], until_s: float | None) -> None:
        """Send the shared requests one after another."""
        for index in remaining:
            body = self._workload.body(index)
            now_s = self._now_s()
            if until_s is not None and now_s >= until_s:
                return
            await self._send(index, now_s, body)

    async def _run_open(self) -> None:
        spec, workload = self._spec, self._workload
        schedule = OpenLoopSchedule(
            arrival_times(spec.rate, spec.arrivals, workload.seed),
            self._now_s() + _LEAD_S,
            max_requests=spec.max_requests,
            duration_s=spec.duration_s,
        )
        next_index = 0
        async with asyncio.TaskGroup() as group:
            while schedule.next_s is not None:
                # Made ahead of its time, so that making it delays nothing.
                body = workload.body(next_index)
                await asyncio.sleep(max(0.0, schedule.next_s - self._now_s()))
                for index, scheduled_s in schedule.due(self._now_s()):
                    ready = body if index == next_index else workload.body(index)
                    group.create_task(self._send(index, scheduled_s, ready))
                next_index = schedule.num_handed_out

    async def _send(self, index: int, scheduled_s: float, body: bytes) -> None:
        record = RequestRecord(index, scheduled_s, sent_s=self._now_s())
        self._records.append(record)
        progress = self._progress
        progress.num_sent += 1
        await self._pool.exchange(body, record)
        progress.num_ended += 1
        progress.num_tokens += record.num_output_tokens
        if not record.is_ok:
            progress.num_failed += 1


def raise_file_limit() -> int:
    """Raise this process's limit of open files as far as it may be; return how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(1, (wanted if soft == resource.RLIM_INFINITY else soft) - _RESERVED_FILES)
