"""What many seeds came to, added up and written for people.

Must not know how a seed is run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

import headrace
from headrace.sim.world import Outcome


class Record(msgspec.Struct, frozen=True):
    """One run of some seeds, as it is kept and added up over many."""

    seeds: list[int]
    """The first and the last."""
    code: str
    """Digest of the package's sources: seeds mean something only together with it."""
    cpu_s: float
    simulated_s: float
    failed: list[int]
    events: dict[str, int]
    faults: dict[str, int]
    requests: dict[str, int]
    num_resumed: int
    """Streams that were continued in another engine."""
    slowest_s: float
    """Longest way back to rest after the last fault."""


def code_digest() -> str:
    """Return what all Python sources of headrace come to, in ten hexadecimal digits."""
    digest = hashlib.sha256()
    root = Path(headrace.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


class Summary:
    """Totals of all outcomes so far."""

    def __init__(self) -> None:
        self.num_seeds = 0
        self.failed: list[int] = []
        self.simulated_s = 0.0
        self.events: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.num_resumed = 0
        self.slowest_s = 0.0

    def add(self, outcome: Outcome) -> None:
        self.num_seeds += 1
        self.simulated_s += outcome.simulated_s
        self.events += outcome.events
        self.faults += outcome.faults
        self.requests += outcome.requests
        self.num_resumed += outcome.num_resumed
        self.slowest_s = max(self.slowest_s, outcome.converged_s)
        if outcome.violation is not None:
            self.failed.append(outcome.seed)

    def record(self, seeds: range, cpu_s: float) -> Record:
        """Return the figures for programs. cpu_s: what all of it took."""
        return Record(
            seeds=[seeds.start, seeds.stop - 1],
            code=code_digest(),
            cpu_s=cpu_s,
            simulated_s=self.simulated_s,
            failed=self.failed,
            events=dict(self.events),
            faults=dict(self.faults),
            requests=dict(self.requests),
            num_resumed=self.num_resumed,
            slowest_s=self.slowest_s,
        )

    def lines(self, cpu_s: float) -> Iterator[str]:
        """Yield the summary. cpu_s: what all of it took."""
        hours = self.simulated_s / 3600
        yield f"seeds: {self.num_seeds}, of which {len(self.failed)} failed {self.failed or ''}".rstrip()
        speed = hours / max(cpu_s, 1e-9)
        yield f"simulated hours: {hours:.2f}; CPU seconds: {cpu_s:.1f}; hours per CPU second: {speed:.3f}"
        yield f"events: {self.events.total()} ({_listed(self.events, 12)})"
        yield f"faults: {self.faults.total()} ({_listed(self.faults, 40)})"
        yield f"requests by end: {_listed(self.requests, 10)}"
        yield f"streams continued in another engine: {self.num_resumed}"
        yield f"longest way back to rest after the last fault: {self.slowest_s:.0f} s"


def _listed(counts: Counter[str], most: int) -> str:
    named = [f"{name} {count}" for name, count in counts.most_common(most)]
    rest = counts.total() - sum(count for _, count in counts.most_common(most))
    return ", ".join([*named, f"others {rest}"] if rest else named) or "none"
