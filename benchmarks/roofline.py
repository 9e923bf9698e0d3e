"""How near a decode step of the native engine comes to what the machine's memory and arithmetic allow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.engines.catalogue import NUM_THREADS
from benchmarks.engines.models import MODELS, BenchModel, ModelMissing
from benchmarks.engines.peaks import Peaks, measure_peaks
from benchmarks.report import Aim, Report, Table
from headrace.bench.statistics import percentile

ROOT = Path(__file__).parents[1]
AIMS = {1: 0.70, 8: 0.60, 32: 0.55}
"""Batch -> share of the memory roofline."""
CONTEXT_TOKENS = 256
LIMIT_S = 240.0
BYTES_PER_WEIGHT = {"int8": 1, "bfloat16": 2, "float32": 4}


def run(*, is_quick: bool) -> Report:
    """Time steps of each model at each batch; the machine's limits before and after."""
    num_steps, rounds = (16, 1) if is_quick else (64, 3)
    command = f"python -m benchmarks roofline{' --quick' if is_quick else ''}"
    method = _METHOD.format(steps=num_steps)
    report = Report("roofline", "Decode steps and the machine's limits", method, command)
    limits = [measure_peaks(NUM_THREADS)]
    found: dict[BenchModel, list[dict[int, dict[str, Any]]]] = {}
    for name, model in MODELS.items():
        try:
            found[model] = [time_steps(name, num_steps) for _ in range(rounds)]
        except (ModelMissing, StepsFailed) as error:
            report.caveats.append(f"{model.title}: {error}")
        limits.append(measure_peaks(NUM_THREADS))
    peaks = highest(limits)
    for model, steps in found.items():
        rows = [_row(model, batch, [timed[batch] for timed in steps], peaks) for batch in AIMS]
        report.tables.append(_table(model, rows, steps[0][1]["path"]))
        report.aims += [_aim(model, row) for row in rows]
        report.data[model.name] = rows
    report.data["peaks"] = asdict(peaks)
    report.tables.append(_peaks_table(peaks))
    report.caveats += _CAVEATS
    return report


def highest(limits: list[Peaks]) -> Peaks:
    """Return the best of each limit: what disturbs a measurement only lowers it."""
    return replace(
        limits[0],
        read_bytes_per_s=max(peaks.read_bytes_per_s for peaks in limits),
        int8_operations_per_s=max(peaks.int8_operations_per_s for peaks in limits),
    )


class StepsFailed(Exception):
    """The timing process failed; the message has its last line."""


def time_steps(name: str, num_steps: int) -> dict[int, dict[str, Any]]:
    """Return what `benchmarks.engines.steps` printed, by batch. Raises StepsFailed, ModelMissing."""
    MODELS[name].gguf()
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "benchmarks.engines.steps", "--model", name]
    command += ["--threads", str(NUM_THREADS), "--context", str(CONTEXT_TOKENS), "--steps", str(num_steps)]
    try:
        done = subprocess.run(
            [*command, "--batches", *map(str, AIMS)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StepsFailed(f"not done within {LIMIT_S:g} s") from error
    if done.returncode:
        raise StepsFailed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {item["batch"]: item for item in found}


def _row(model: BenchModel, batch: int, found: list[dict[str, Any]], peaks: Peaks) -> dict[str, Any]:
    """Return one batch's floors and times. The round with the lowest median counts: noise only adds."""
    medians_s = [percentile(sorted(item["times_s"]), 0.5) for item in found]
    step_s = min(medians_s)
    path = str(found[0]["path"])
    width = next((width for word, width in BYTES_PER_WEIGHT.items() if path.startswith(word)), 4)
    weight_bytes = model.num_weights * width
    kv_bytes = batch * CONTEXT_TOKENS * int(found[0]["kv_bytes_per_token"])
    memory_s = (weight_bytes + kv_bytes) / peaks.read_bytes_per_s
    compute_s = 0.0
    if width == 1 and peaks.int8_operations_per_s:
        compute_s = 2 * model.num_weights * batch / peaks.int8_operations_per_s
    floor_s = max(memory_s, compute_s)
    return {
        "batch": batch,
        "path": path,
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "memory_floor_s": memory_s,
        "compute_floor_s": compute_s,
        "step_s": step_s,
        "medians_s": medians_s,
        "best_s": min(min(item["times_s"]) for item in found),
        "memory_share": memory_s / step_s,
        "share": floor_s / step_s,
        "tokens_per_s": batch / step_s,
    }


def _aim(model: BenchModel, row: dict[str, Any]) -> Aim:
    batch, share = row["batch"], row["memory_share"]
    figure = f"{model.title}, memory roofline at batch {batch}"
    return Aim(figure, f"at least {AIMS[batch]:.0%}", f"{share:.0%}", share >= AIMS[batch])


def _table(model: BenchModel, rows: list[dict[str, Any]], path: str) -> Table:
    headers = (
        *("batch", "step ms", "tokens/s", "weights MB", "KV MB", "memory floor ms", "of memory"),
        *("compute floor ms", "of the higher floor"),
    )
    cells = [
        [
            str(row["batch"]),
            f"{row['step_s'] * 1e3:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['kv_bytes'] / 1e6:.1f}",
            f"{row['memory_floor_s'] * 1e3:.2f}",
            f"**{row['memory_share']:.0%}**",
            f"{row['compute_floor_s'] * 1e3:.2f}" if row["compute_floor_s"] else "-",
            f"**{row['share']:.0%}**",
        ]
        for row in rows
    ]
    return Table(f"{model.title} ({path}), context {CONTEXT_TOKENS}", headers, cells)


def _peaks_table(peaks: Peaks) -> Table:
    operations = peaks.int8_operations_per_s
    row = [
        str(peaks.num_threads),
        f"{peaks.read_bytes_per_s / 1e9:.1f} GB/s",
        f"{operations / 1e9:.0f} GOP/s" if operations else "not measured",
        peaks.how,
    ]
    return Table(
        "The machine's limits in this run", ("threads", "memory reads", "int8", "measured by"), [row]
    )


_METHOD = (
    "The native engine without a server: scheduler, step, sampling. A step is the median of {steps} in which "
    f"the whole batch decodes at a mean context of {CONTEXT_TOKENS} tokens. The memory floor is the time to "
    "read every weight once and all keys and values once; the compute floor is the time for two operations "
    "per weight and row. Both by limits that were measured in the same run. A step is never shorter than the "
    "higher one."
)
_CAVEATS = [
    "The compute floor counts the matrices alone: attention, norms and sampling come on top.",
    "A model whose weights fit into the last-level cache could be faster than its memory floor.",
]
