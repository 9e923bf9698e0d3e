"""Runs a benchmark again in namespaces of its own: processes, network, mounts.

What starts a Ray cluster disturbs nobody there, is disturbed by nobody, and leaves nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

IN_NAMESPACES = Path(__file__).parents[1] / "tests" / "cluster" / "in_namespaces.sh"
STOP_LIMIT_S = 60.0
_INSIDE = "HEADRACE_BENCHMARK_INSIDE"


def run_in_namespaces(arguments: Sequence[str]) -> int | None:
    """Run `python -m benchmarks ARGUMENTS` in namespaces and return its exit code; None: this process is
    already there."""
    if os.environ.get(_INSIDE):
        return None
    command = ["sh", str(IN_NAMESPACES), sys.executable, "-m", "benchmarks", *arguments]
    process = subprocess.Popen(command, env={**os.environ, _INSIDE: "1"})
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the benchmark end what it started; then end its namespaces with all that is in them."""
    outer = psutil.Process(process.pid)
    for benchmark in outer.children() if outer.name() == "unshare" else [outer]:  # it passes nothing on
        benchmark.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
