"""Several ranks beside several threads: the time of a step, what handing it out and scheduling cost."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.ray_ranks import RayMissing, rank_placed_by_ray
from benchmarks.report import Aim, Report, Table
from benchmarks.system import MODEL
from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import SystemClock
from headrace.engine.fused_sampling import load_fused_sampling
from headrace.engine.model_files.resolve import resolve_model
from headrace.engine.native import NativeEngine
from headrace.engine.protocol import StepInput
from headrace.engine.runner import DecoderRunner
from headrace.engine.sampler import Sampler
from headrace.engine.workers.group import RankStarter, WorkerGroup
from headrace.engine.workers.local import start_local_rank
from headrace.engine.workers.parallel_runner import ParallelRunner, load_any_runner

BLOCK_SIZE = 16
BATCH = 32
AIM_BROADCAST_US, AIM_SCHEDULING, AIM_PLACED = 100.0, 0.03, 1.02
CASES = {
    "1 decode, 128 tokens": (1, 128, 1),
    "8 decodes, 256 tokens": (8, 256, 1),
    "32 decodes, 256 tokens": (32, 256, 1),
    "a prompt of 512": (1, 512, 512),
}
"""Requests, tokens that each has after the step, and new ones of each."""
THREADS, LOCAL, PLACED = "1 rank, 2 threads", "2 ranks of 1 thread", "the same, placed by Ray"
SETUPS = {"1 rank, 1 thread": (1, 1), THREADS: (1, 2), LOCAL: (2, 2)}
Runner = DecoderRunner | ParallelRunner
Loaded = tuple[EngineSpec, Runner, WorkerGroup | None]
Row = tuple[str, ...]


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


def load(num_ranks: int, num_threads: int, start_rank: RankStarter) -> Loaded:
    spec = EngineSpec(
        "native",
        MODEL,
        tensor_parallel=num_ranks,
        num_threads=num_threads,
        block_size=BLOCK_SIZE,
        dtype="int8",
    )
    group = WorkerGroup(spec, start_rank) if num_ranks > 1 else None
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


PHASES = {"scheduling": ("_scheduler.schedule", "_builder.build"), "sampling": ("_sampler.sample",)}
"""Of a step, beside the model: what the engine does in each, as its own parts are called. The rest is
outputs: accounts, what each request was given, and the load."""
STREAMS = (1, 16, 32)


def phases_of(spec: EngineSpec, runner: Runner, num_streams: int, num_steps: int) -> dict[str, float]:
    """Medians, in seconds, of what a step of decodes takes, and each of its phases."""
    engine = NativeEngine(spec, runner, SystemClock(), sampler=Sampler(load_fused_sampling(runner.team)))
    spent: dict[str, list[float]] = {name: [] for name in (*PHASES, "model", "step")}

    def timed(owner: object, method: str, phase: str) -> None:
        call = getattr(owner, method)

        def measured(*arguments: object) -> object:
            begin_s = time.perf_counter()
            result = call(*arguments)
            spent[phase][-1] += time.perf_counter() - begin_s
            return result

        setattr(owner, method, measured)

    for phase, methods in PHASES.items():
        for owner, _, method in (each.partition(".") for each in methods):
            timed(getattr(engine, owner), method, phase)
    timed(runner, "execute", "model")
    sampling = SamplingParams(max_tokens=num_steps, temperature=0.0, ignore_eos=True)
    for index in range(num_streams):
        engine.submit(GenerationRequest(f"r{index}", list(range(100, 132)), sampling))
    while engine.has_work():
        for times in spent.values():
            times.append(0.0)
        begin_s = time.perf_counter()
        engine.step()
        spent["step"][-1] = time.perf_counter() - begin_s
    del runner.execute
    return {name: statistics.median(times[num_steps // 4 :]) for name, times in spent.items()}


def phase_rows(loaded: Mapping[str, Loaded], num_steps: int, report: Report) -> tuple[list[Row], float]:
    """A row per setup and number of streams, and the largest share that scheduling has of a step."""
    rows, shares = [], []
    for name, (spec, runner, _) in loaded.items():
        for num_streams in STREAMS:
            found = phases_of(spec, runner, num_streams, num_steps)
            report.data[f"phases, {name}, {num_streams} streams"] = found
            step_s, rest_s = found["step"], 2 * found["step"] - sum(found.values())
            shares.append(found["scheduling"] / step_s)
            parts = (found["scheduling"], found["sampling"], rest_s)
            cells = [f"{part * 1e6:.0f} µs ({part / step_s:.1%})" for part in parts]
            rows.append((name, str(num_streams), f"{step_s * 1e3:.2f}", *cells))
    return rows, max(shares)


def step_rows(loaded: Mapping[str, Loaded], rounds: int, count: int, report: Report) -> list[Row]:
    """A row per kind of step: its median time in each setup; rounds alternate between the setups."""
    rows: list[Row] = []
    for case, sizes in CASES.items():
        batch, num = step(*sizes), max(count // (1 if sizes[2] == 1 else 6), 2)
        found: dict[str, list[float]] = {name: [] for name in loaded}
        for _ in range(rounds):
            for name, (_, runner, _) in loaded.items():
                found[name].append(median_s(lambda r=runner, b=batch: r.execute(b), num))  # type: ignore[misc]
        medians = {name: statistics.median(times) * 1e3 for name, times in found.items()}
        threads, ranks = medians[THREADS], medians[LOCAL]
        ratios = [f"{ranks / threads:.2f}", f"{medians[PLACED] / ranks:.3f}" if PLACED in medians else "-"]
        rows.append((case, *(f"{ms:.2f}" for ms in medians.values()), *ratios))
        report.data[case] = medians
    return rows


def run(is_quick: bool = False) -> Report:
    """Measure SmolLM2 in int8; rounds alternate between the setups."""
    report = Report(
        "parallel",
        "Ranks: one model in several processes",
        f"{MODEL}, int8. Rounds alternate between one rank of one or two threads, and two ranks of one "
        "thread, started by the engine, or the second one in a host of its own that Ray placed; medians. Two "
        "ranks of this small model on one socket show what meeting costs, not what ranks are for.",
    )
    rounds, count = (1, 5) if is_quick else (8, 30)
    with contextlib.ExitStack() as stack:
        loaded = {name: load(*sizes, start_local_rank) for name, sizes in SETUPS.items()}
        try:
            loaded[PLACED] = load(2, 2, stack.enter_context(rank_placed_by_ray()))
        except RayMissing as missing:
            report.caveats.append(f"No rank was placed by Ray: {missing}")
        rows = step_rows(loaded, rounds, count, report)
        titles = ("step", *loaded, "ranks / threads", "placed / local")
        report.tables.append(Table("Time of a step, ms", titles, rows))
        aims(loaded, 2 * count, report)
        for _, _, group in loaded.values():
            if group is not None:
                group.close()
    return report


def aims(loaded: Mapping[str, Loaded], num_steps: int, report: Report) -> None:
    """What the aims are about."""
    _, runner, group = loaded[LOCAL]
    assert isinstance(runner, ParallelRunner)
    assert group is not None
    broadcast = broadcast_us(runner, group, step(*CASES["32 decodes, 256 tokens"]), num_steps)
    rows, share = phase_rows(loaded, num_steps, report)
    titles = ("setup", "streams", "step, ms", "scheduling", "sampling", "outputs")
    report.tables.append(Table("What a step takes outside the model", titles, rows))
    report.data |= {"broadcast_us": broadcast, "share_scheduling": share}
    if PLACED in loaded:
        ratios = [report.data[case][PLACED] / report.data[case][LOCAL] for case in CASES]
        ratio = statistics.geometric_mean(ratios)
        report.data["placed_over_local"] = ratio
        report.aims.append(
            Aim(
                "step of two ranks placed by Ray / of two local ones",
                f"≤ {AIM_PLACED}",
                f"{ratio:.3f}",
                ratio <= AIM_PLACED,
            )
        )
    report.aims += [
        Aim(
            "broadcast of a step of 32 decodes",
            f"≤ {AIM_BROADCAST_US:.0f} µs",
            f"{broadcast:.0f} µs",
            broadcast <= AIM_BROADCAST_US,
        ),
        Aim(
            "largest share of a step spent scheduling",
            f"≤ {AIM_SCHEDULING:.0%}",
            f"{share:.1%}",
            share <= AIM_SCHEDULING,
        ),
    ]
