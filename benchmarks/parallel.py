"""Several ranks beside several threads: the time of a step, what handing it out and scheduling cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.report import Aim, Report, Table
from benchmarks.system import MODEL
from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import SystemClock
from headrace.engine.model_files.resolve import resolve_model
from headrace.engine.native import NativeEngine
from headrace.engine.protocol import StepInput
from headrace.engine.runner import DecoderRunner
from headrace.engine.workers.group import WorkerGroup
from headrace.engine.workers.local import start_local_rank
from headrace.engine.workers.parallel_runner import ParallelRunner, load_any_runner

BLOCK_SIZE = 16
BATCH = 32
AIM_BROADCAST_US, AIM_SCHEDULING = 100.0, 0.03
CASES = {
    "1 decode, 128 tokens": (1, 128, 1),
    "8 decodes, 256 tokens": (8, 256, 1),
    "32 decodes, 256 tokens": (32, 256, 1),
    "a prompt of 512": (1, 512, 512),
}
"""Requests, tokens that each has after the step, and new ones of each."""
SETUPS = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks of 1 thread": (2, 2)}
Runner = DecoderRunner | ParallelRunner


def step(num_requests: int, context: int, num_new: int) -> StepInput:
    """A step of requests that are alike, each with blocks of its own."""
    per_request = -(-context // BLOCK_SIZE)
    tables = [list(range(r * per_request, (r + 1) * per_request)) for r in range(num_requests)]
    places = np.arange(context - num_new, context, dtype=np.int32)
    starts = np.arange(num_requests + 1, dtype=np.int32) * num_new
    return StepInput(
        token_ids_T=np.arange(num_requests * num_new, dtype=np.int32) % 1000 + 100,
        positions_T=np.tile(places, num_requests),
        slots_T=np.concatenate([places + table[0] * BLOCK_SIZE for table in tables]).astype(np.int32),
        query_starts=starts,
        context_lengths_R=np.full(num_requests, context, np.int32),
        block_tables=tables,
        sampled_rows_S=starts[1:] - 1,
    )


def load(num_ranks: int, num_threads: int) -> tuple[EngineSpec, Runner, WorkerGroup | None]:
    spec = EngineSpec(
        "native",
        MODEL,
        tensor_parallel=num_ranks,
        num_threads=num_threads,
        block_size=BLOCK_SIZE,
        dtype="int8",
    )
    group = WorkerGroup(spec, start_local_rank) if num_ranks > 1 else None
    return spec, load_any_runner(spec, resolve_model(MODEL), lambda _phase: None, group), group


def median_s(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        begin_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times)


def broadcast_us(runner: ParallelRunner, group: WorkerGroup, batch: StepInput, count: int) -> float:
    """Median time to hand a step out, in microseconds."""
    times = []
    post = group.post_step

    def timed(step: StepInput) -> StepInput:
        begin_s = time.perf_counter()
        posted = post(step)
        times.append(time.perf_counter() - begin_s)
        return posted

    group.post_step = timed  # type: ignore[method-assign, assignment]
    try:
        for _ in range(count):
            runner.execute(batch)
    finally:
        group.post_step = post  # type: ignore[method-assign]
    return statistics.median(times) * 1e6


def share_outside_model(spec: EngineSpec, runner: Runner, num_steps: int) -> float:
    """What part of a step of BATCH decodes passes outside the model: scheduling, sampling and accounts."""
    engine = NativeEngine(spec, runner, SystemClock())
    sampling = SamplingParams(max_tokens=num_steps, temperature=0.0, ignore_eos=True)
    for index in range(BATCH):
        engine.submit(GenerationRequest(f"r{index}", list(range(100, 132)), sampling))
    in_model_s, execute = 0.0, runner.execute

    def timed(batch: StepInput) -> object:
        nonlocal in_model_s
        begin_s = time.perf_counter()
        logits = execute(batch)
        in_model_s += time.perf_counter() - begin_s
        return logits

    runner.execute = timed  # type: ignore[method-assign, assignment]
    begin_s = time.perf_counter()
    while engine.has_work():
        engine.step()
    all_s = time.perf_counter() - begin_s
    runner.execute = execute  # type: ignore[method-assign]
    return 1 - in_model_s / all_s


def run(is_quick: bool = False) -> Report:
    """Measure SmolLM2 in int8; rounds alternate between the setups."""
    report = Report(
        "parallel",
        "Ranks: one model in several processes",
        f"{MODEL}, int8. Rounds alternate between one rank of one or two threads and two ranks of one "
        "thread; medians. Two ranks of this small model on one socket show what meeting costs, not what "
        "ranks are for.",
    )
    rounds, count = (1, 5) if is_quick else (4, 30)
    loaded = {name: load(*sizes) for name, sizes in SETUPS.items()}
    rows = []
    for case, sizes in CASES.items():
        batch, num = step(*sizes), max(count // (1 if sizes[2] == 1 else 6), 2)
        found: dict[str, list[float]] = {name: [] for name in SETUPS}
        for _ in range(rounds):
            for name, (_, runner, _) in loaded.items():
                found[name].append(median_s(lambda r=runner, b=batch: r.execute(b), num))  # type: ignore[misc]
        medians = {name: statistics.median(times) * 1e3 for name, times in found.items()}
        threads, ranks = medians["1 rank, 2 threads"], medians["2 ranks of 1 thread"]
        rows.append((case, *(f"{ms:.2f}" for ms in medians.values()), f"{ranks / threads:.2f}"))
        report.data[case] = medians
    report.tables.append(Table("Time of a step, ms", ("step", *SETUPS, "ranks / threads"), rows))
    spec, runner, group = loaded["2 ranks of 1 thread"]
    assert isinstance(runner, ParallelRunner)
    assert group is not None
    broadcast = broadcast_us(runner, group, step(*CASES["32 decodes, 256 tokens"]), 2 * count)
    share = share_outside_model(spec, runner, 2 * count)
    group.close()
    report.data |= {"broadcast_us": broadcast, "share_outside_model": share}
    report.aims += [
        Aim(
            "broadcast of a step of 32 decodes",
            f"≤ {AIM_BROADCAST_US:.0f} µs",
            f"{broadcast:.0f} µs",
            broadcast <= AIM_BROADCAST_US,
        ),
        Aim(
            "share of such a step outside the model",
            f"≤ {AIM_SCHEDULING:.0%}",
            f"{share:.1%}",
            share <= AIM_SCHEDULING,
        ),
    ]
    return report
