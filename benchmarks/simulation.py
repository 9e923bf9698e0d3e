"""`simulation`: what many seeds of the simulation came to.

Reports the runs that were recorded in `build/simulation.jsonl` (`python -m headrace.sim --seeds A-B --fast
--record build/simulation.jsonl`, as often as wanted); without any it runs some itself. No figure here is a
time of the product: it is how much was tried, and what did not hold.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.report import Aim, Report, Table
from headrace.sim.summary import Record

RECORDED = Path("build/simulation.jsonl")
NUM_SEEDS, NUM_SEEDS_QUICK = 1000, 20
WANTED_SEEDS = 10_000
METHOD = (
    "The real decisions of controller, router, front and engine on a virtual clock, in worlds of simulated "
    "machines, processes, links and clients that break as each seed says; after every event the invariants "
    "that can be seen there are checked, and once faults have stopped everything must come to rest "
    "([what is real](../../docs/concepts/simulation.md)). One process, one core."
)
FOUND = (
    (
        "seed 149 of the first scenarios",
        "a request that came again within a step got a token of its aborted first try",
        "fixed",
    ),
    (
        "reading, after seed 201 of older code",
        "a standby whose engine died while it was promoted came back asleep, and was asked again after 30 s",
        "fixed: the wish decides what comes back",
    ),
    (
        "reading both writings of a front",
        "a report's phase was an old wish's error while the engine started; a failed replica that was to "
        "sleep said that it goes on standby",
        "fixed: one room says both",
    ),
    (
        "writing the relay's model",
        "the place of a parked stream whose relay never came again was kept for ever; a third arrival under "
        "one id closed the connection with everything that was held on it (seed 48)",
        "fixed: given back after 60 s; refused alone",
    ),
    (
        "seeds 308 and 310",
        "a stop in the simulated supervisor outlived the child that it was for",
        "a fault of the model, not of the product; fixed",
    ),
    (
        "seed 2215",
        "a request that came before one which waited for its version was held beside room for up to 100 ms",
        "fixed: turns are looked at again when a request is held, and when rules change",
    ),
    (
        "seeds 1674 and 3116",
        "a paused rollout keeps both versions, and the check took that for replicas too many",
        "a fault of the check; each version's own count is compared now",
    ),
    (
        "seeds 3421, 3424, 3444, 3485, 3682, 3772",
        "the request log gave the tokens of a first try that was refused or broke off; a later one answered",
        "fixed: a line tells the try that answered",
    ),
    (
        "seed 3650",
        "a request that failed before its first token was over after 2 s while HAProxy had it elsewhere",
        "fixed: it is in flight until its line comes",
    ),
    (
        "seed 4086",
        "the slot of a request whose client left while it was parked went to nobody until the next tick",
        "fixed: whoever is next is bound at once",
    ),
    (
        "seeds 6635 and 6676",
        "a controller that was stopped, or whose clock jumped, took fronts for hung before it read",
        "fixed: time in which it did not look is nobody's silence",
    ),
    (
        "seed 6946",
        "a pass that was announced after its line gave its request a second line of the request log",
        "fixed: what the router knows is not opened again",
    ),
    (
        "seed 7074",
        "a request that came again at a durable front got a token of its aborted try, and so one twice",
        "fixed: ids in engines are new for a whole front",
    ),
    (
        "seed 7455",
        "a request that came again by itself was parked for a lost call, and waited for ever",
        "fixed: a later pass overtakes the earlier one's waiting",
    ),
    (
        "a property test of the reconciler",
        "a second turn at one moment started one more standby, while versions changed without surge",
        "fixed: a standby that starts stays one while no serving replica may be started",
    ),
)
"""What the simulation found since it records; what came before is in docs/adr/0028."""


def run(is_quick: bool) -> Report:
    """Report what was recorded, or run some seeds."""
    report = Report("simulation", "Simulation: invariants under faults, seed by seed", METHOD)
    if RECORDED.exists() and not is_quick:
        lines = RECORDED.read_bytes().splitlines()
    else:
        lines = _run_seeds(NUM_SEEDS_QUICK if is_quick else NUM_SEEDS)
    records = [msgspec.json.decode(line, type=Record) for line in lines]
    _fill(report, records)
    return report


def _run_seeds(num_seeds: int) -> list[bytes]:
    with tempfile.TemporaryDirectory(prefix="headrace-simulation-") as folder:
        path = Path(folder) / "record.jsonl"
        command = [
            sys.executable,
            "-m",
            "headrace.sim",
            "--seeds",
            f"1-{num_seeds}",
            "--fast",
            "--record",
            str(path),
        ]
        # Exit status 1 says that a seed failed: that is a result.
        subprocess.run(command, check=False, timeout=20.0 * num_seeds + 60, stdout=sys.stderr)
        return path.read_bytes().splitlines()


def _fill(report: Report, records: Sequence[Record]) -> None:
    num_seeds = sum(last - first + 1 for first, last in (record.seeds for record in records))
    failed = sorted(seed for record in records for seed in record.failed)
    hours = sum(record.simulated_s for record in records) / 3600
    cpu_s = sum(record.cpu_s for record in records)
    events = _added(record.events for record in records)
    faults = _added(record.faults for record in records)
    requests = _added(record.requests for record in records)
    report.aims = [
        Aim(
            "seeds that kept every invariant", "all", f"{num_seeds - len(failed)} of {num_seeds}", not failed
        ),
        Aim("seeds", f"at least {WANTED_SEEDS}", str(num_seeds), num_seeds >= WANTED_SEEDS),
    ]
    totals = [
        ("simulated hours", f"{hours:.1f}"),
        ("simulated hours per CPU second", f"{hours / max(cpu_s, 1e-9):.3f}"),
        ("CPU seconds per seed", f"{cpu_s / max(num_seeds, 1):.2f}"),
        ("events", f"{events.total():,}"),
        ("faults", f"{faults.total():,}"),
        ("requests", f"{requests.total():,}"),
        ("streams continued in another engine", f"{sum(record.num_resumed for record in records):,}"),
        (
            "longest way back to rest after the last fault",
            f"{max((r.slowest_s for r in records), default=0):.0f} s",
        ),
    ]
    report.tables = [
        Table("What was tried", ("", ""), totals),
        Table("Faults by kind", ("fault", "times"), _rows(faults)),
        Table("Requests by how they ended, for their clients", ("end", "requests"), _rows(requests)),
        Table("Events by kind", ("event", "times"), _rows(events)),
        Table("What was found", ("where", "what", "now"), FOUND),
    ]
    codes = Counter(record.code for record in records)
    report.caveats = [
        f"Run over {len(codes)} states of the code ({', '.join(codes)}): a seed's world is that of its code.",
        "Sockets, HTTP, HAProxy and text are stood for; tests with real processes are their proof.",
    ]
    if failed:
        report.caveats.append(f"Seeds that failed: {', '.join(map(str, failed))}.")
    report.data = {"records": [msgspec.to_builtins(record) for record in records]}


def _added(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def _rows(counts: Counter[str]) -> list[tuple[str, str]]:
    return [(name, f"{count:,}") for name, count in counts.most_common()]
