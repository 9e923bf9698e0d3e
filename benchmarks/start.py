"""Start to first token, several times, with its phases: of `headrace up`, and of one engine in every way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine_start import COLD, MODEL, PACKED, PROMPT_TOKENS, STANDBY, WAKE, Samples, measure_starts
from benchmarks.report import Aim, Report, Table
from benchmarks.system import free_port, workload
from headrace.bench.load import LoadSpec, run_load
from headrace.bench.statistics import percentile
from headrace.bench.target import parse_target

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
AIM_S = 10.0
ENGINE_AIMS_S = {COLD: 4.0, PACKED: 2.0, STANDBY: 0.1, WAKE: 0.5}
LIMIT_S = 120.0
STOP_LIMIT_S = 60.0


@dataclass
class Start:
    """One start's times in seconds from the command."""

    listens_s: float = 0.0
    """The gateway takes connections."""
    first_token_s: float = 0.0
    ready_s: float = 0.0
    """Every replica is ready, by `headrace status`."""
    stopped_s: float = 0.0
    """From SIGINT to the end of the process."""
    engine_phases: dict[str, dict[str, float]] = field(default_factory=dict)
    """Replica -> phase -> seconds."""


def run(*, is_quick: bool) -> Report:
    """Start one engine in every way, then start and stop the quickstart's system, several times each."""
    count = 1 if is_quick else 5
    report = Report(
        "start",
        "Start to first token",
        f"First one engine process, {count} times each way, by turns: a request of {PROMPT_TOKENS} tokens to "
        f"{MODEL} is there from the start, and 0 is the process's start, or the word to wake. Files are in "
        "the page cache unless it says otherwise. Then "
        f"`headrace up examples/quickstart.yaml`, installed, files in the page cache, {count} times: a "
        "client asks over and over until the first token comes; 0 is the start of the command.",
    )
    engine = measure_starts(count)
    report.aims += _engine_aims(engine)
    report.tables += [_engine_table(engine), _engine_phases(engine)]
    starts = [measure() for _ in range(count)]
    rows = [
        [str(n), *(f"{value:.2f}" for value in (s.listens_s, s.first_token_s, s.ready_s, s.stopped_s))]
        for n, s in enumerate(starts, 1)
    ]
    headers = ("start", "gateway listens", "**first token**", "all replicas ready", "stop, from SIGINT")
    report.tables.append(Table("Seconds from the command", headers, rows))
    median_s = percentile(sorted(start.first_token_s for start in starts), 0.5)
    report.aims.append(
        Aim("command to first token, median", f"at most {AIM_S:g} s", f"{median_s:.2f} s", median_s <= AIM_S)
    )
    report.tables.append(_phases(starts))
    report.data = {
        "starts": [vars(start) for start in starts],
        "engine": {way: vars(samples) for way, samples in engine.items()},
    }
    report.caveats.append("Both replicas load at the same time on the same cores.")
    return report


def measure() -> Start:
    """Start, wait for the first token, ask for the status, stop."""
    start = Start()
    with up() as (process, port, environment, started_s):
        url = f"http://127.0.0.1:{port}/v1"
        target = parse_target(url, "/chat/completions")
        while True:
            _check(process, started_s)
            spec = LoadSpec(concurrency=1, max_requests=1, timeout_s=LIMIT_S)
            [record] = run_load(target, workload(16, 8), spec).records
            if not start.listens_s and record.error != "connect":
                start.listens_s = record.sent_s - started_s
            if record.is_ok:
                start.first_token_s = record.token_times[0] - started_s
                break
            time.sleep(0.01)
        while not start.ready_s:
            _check(process, started_s)
            status = _status(environment)
            if status.get("is_ready"):
                start.ready_s = time.monotonic() - started_s
                start.engine_phases = {
                    replica["replica_id"]: replica.get("start_phases", {}) for replica in status["replicas"]
                }
        stop_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(STOP_LIMIT_S)
        start.stopped_s = time.monotonic() - stop_s
    return start


@contextmanager
def up() -> Iterator[tuple[subprocess.Popen[bytes], int, dict[str, str], float]]:
    """Run `headrace up` in a runtime directory of its own; it is stopped at the end, come what may."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="headrace-start-") as folder:
        source = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "XDG_RUNTIME_DIR": folder, "TMPDIR": folder, "PYTHONPATH": source}
        command = [sys.executable, "-m", "headrace", "up", str(QUICKSTART)]
        with (Path(folder) / "up.log").open("wb") as log:
            started_s = time.monotonic()
            process = subprocess.Popen(
                [*command, "--set", f"gateway.bind=127.0.0.1:{port}"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process, port, environment, started_s
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_LIMIT_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _check(process: subprocess.Popen[bytes], started_s: float) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"headrace up ended with exit code {process.returncode}")
    if time.monotonic() - started_s > LIMIT_S:
        raise RuntimeError(f"no first token within {LIMIT_S:g} s")


def _status(environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "status", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        return {}
    tree: dict[str, Any] = json.loads(done.stdout)
    return tree


def _engine_aims(engine: dict[str, Samples]) -> list[Aim]:
    aims = []
    for way, aim_s in ENGINE_AIMS_S.items():
        median_s = percentile(sorted(engine[way].first_token_s), 0.5)
        text = f"at most {aim_s:g} s"
        aims.append(
            Aim(f"engine to first token, {way}, median", text, f"{median_s:.3f} s", median_s <= aim_s)
        )
    return aims


def _engine_table(engine: dict[str, Samples]) -> Table:
    rows = []
    for way, samples in engine.items():
        columns = [sorted(samples.until_ready_s), sorted(samples.first_token_s)]
        rows.append([way, *(f"{value:.3f}" for s in columns for value in (percentile(s, 0.5), s[-1]))])
    headers = ("one engine", "ready or awake, p50", "max", "**first token, p50**", "max")
    return Table("One engine, in seconds from its start or from the word to wake", headers, rows)


def _engine_phases(engine: dict[str, Samples]) -> Table:
    """Return the median of each phase, for each way to start."""
    ways = [way for way, samples in engine.items() if samples.phases]
    names = list(dict.fromkeys(name for way in ways for phases in engine[way].phases for name in phases))
    rows = []
    for name in names:
        medians = [percentile(sorted(p.get(name, 0.0) for p in engine[way].phases), 0.5) for way in ways]
        rows.append([name, *(f"{median_s:.3f}" for median_s in medians)])
    return Table("Phases of one engine's start, medians in seconds", ("phase", *ways), rows)


def _phases(starts: list[Start]) -> Table:
    """Return the median of each engine phase over all replicas and starts."""
    samples: dict[str, list[float]] = {}
    for start in starts:
        for phases in start.engine_phases.values():
            for phase, seconds in phases.items():
                samples.setdefault(phase, []).append(seconds)
    rows = [
        [phase, f"{percentile(sorted(values), 0.5):.2f}", f"{max(values):.2f}"]
        for phase, values in samples.items()
    ]
    return Table(
        "Phases of the engines' starts in the system, in seconds", ("phase", "median", "longest"), rows
    )
