"""Memory of every process of the quickstart system, idle and after load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import Memory, sample_memory
from benchmarks.report import Aim, Report, Table
from benchmarks.system import load, serve, workload
from headrace.bench.load import LoadSpec
from headrace.units import GIB, MIB

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
AIM_BYTES = 2 * GIB


def run(*, is_quick: bool) -> Report:
    """Measure the quickstart's system: gateway, controller, two native replicas."""
    requests = 8 if is_quick else 64
    report = Report(
        "memory",
        "Memory of the quickstart system",
        f"The endpoint of examples/quickstart.yaml; idle once ready, and after {requests} requests of 256 "
        "words in and 64 tokens out, 16 at a time. Resident counts shared pages in every process; "
        "proportional shares them out, so only its sum is the system's size.",
    )
    [endpoint] = yaml.safe_load(QUICKSTART.read_text())["endpoints"].values()
    with serve(endpoint) as system:
        idle = sample_memory()
        load(system.url, workload(256, 64), LoadSpec(concurrency=16, max_requests=requests))
        loaded = sample_memory()
    before = {memory.pid: memory for memory in idle}
    rows = [_row(before.get(memory.pid), memory) for memory in loaded]
    sums = [
        sum(getattr(memory, kind) for memory in when)
        for kind in ("resident", "proportional", "unique")
        for when in (idle, loaded)
    ]
    rows.append(["**sum**", *(_mib(value) for value in sums)])
    headers = (
        "MiB",
        "resident idle",
        "after load",
        "proportional idle",
        "after load",
        "unique idle",
        "after load",
    )
    report.tables.append(Table("Memory per process", headers, rows))
    total = sum(memory.proportional for memory in loaded)
    report.aims.append(
        Aim(
            "whole system after load, proportional",
            "at most 2 GiB",
            f"{total / GIB:.2f} GiB",
            total <= AIM_BYTES,
        )
    )
    resident = sum(memory.resident for memory in loaded)
    report.aims.append(
        Aim("the same, resident summed", "at most 2 GiB", f"{resident / GIB:.2f} GiB", resident <= AIM_BYTES)
    )
    report.data = {
        "idle": [_plain(memory) for memory in idle],
        "loaded": [_plain(memory) for memory in loaded],
    }
    return report


def _row(idle: Memory | None, loaded: Memory) -> list[str]:
    cells = [loaded.title]
    for kind in ("resident", "proportional", "unique"):
        cells.append(_mib(getattr(idle, kind)) if idle else "-")
        cells.append(_mib(getattr(loaded, kind)))
    return cells


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.0f}"


def _plain(memory: Memory) -> dict[str, Any]:
    return {"title": memory.title, "role": memory.role, "resident": memory.resident,
            "unique": memory.unique, "proportional": memory.proportional}  # fmt: skip
