"""The machine's limits, measured now: memory reads and int8 arithmetic per second."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("peaks.cpp")
COMPILERS = ("g++", "clang++", "c++")
_TORCH_VALUES = 64 * 1024 * 1024
_REPEATS = 15


@dataclass(frozen=True)
class Peaks:
    """What `num_threads` can do together at best."""

    num_threads: int
    read_bytes_per_s: float
    int8_operations_per_s: float
    """Multiplications and additions; 0: not measured."""
    how: str


def measure_peaks(num_threads: int) -> Peaks:
    """Measure with a small program compiled for this machine; without a compiler, reads alone, with torch."""
    compiler = next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        return _measure_with_torch(num_threads, "no compiler")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        options = ["-O3", "-march=native", "-std=c++17", "-pthread"]
        built = subprocess.run(
            [compiler, *options, str(SOURCE), "-o", str(program)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if built.returncode:
            return _measure_with_torch(num_threads, built.stderr.splitlines()[-1][:100])
        done = subprocess.run(
            [str(program), str(num_threads)], capture_output=True, text=True, timeout=60, check=True
        )
    found = json.loads(done.stdout)
    return Peaks(
        num_threads,
        found["read_bytes_per_s"],
        found["int8_operations_per_s"],
        f"a C++ program of its own, {found['instruction'] or 'no int8 instructions'}",
    )


def _measure_with_torch(num_threads: int, reason: str) -> Peaks:
    """Return the fastest of torch's ways to read a large tensor once."""
    import torch

    torch.set_num_threads(num_threads)
    values = torch.ones(_TORCH_VALUES)
    matrix, vector = values.view(8192, -1), torch.ones(_TORCH_VALUES // 8192)
    ways = (lambda: torch.mv(matrix, vector), values.max, lambda: torch.dot(values, values))
    best_s = min(_seconds(way) for way in ways for _ in range(_REPEATS))
    how = f"torch over a large tensor ({reason}): a little below what the memory gives"
    return Peaks(num_threads, values.nbytes / best_s, 0.0, how)


def _seconds(work: object) -> float:
    assert callable(work)
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
