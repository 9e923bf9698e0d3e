"""The native engine's throughput, beside transformers in the same run and other engines' earlier figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.report import Aim, Report, Table
from benchmarks.system import MODEL, evaluate_valid, load, serve, workload
from headrace.bench.load import LoadSpec
from headrace.bench.results import RunResult

NUM_THREADS = 2
NUM_INPUT = NUM_OUTPUT = 128
CONCURRENCY = (1, 4, 16, 32)
PEER_LIMIT_S = 600.0
# Measured in November 2026 with the same model and lengths, on another 2-core machine, each engine's own
# server: output tokens/s and TPOT p50 in ms. None: it died.
VLLM = {1: (13.6, 73), 4: (46.6, 82), 16: (146, 95), 32: (211, 137)}
LLAMA_CPP: dict[int, tuple[float, float] | None] = {1: (60.8, 11.2), 4: (67.0, 38), 16: None, 32: None}


def run(*, is_quick: bool) -> Report:
    """Measure at each concurrency, headrace and transformers in turns."""
    report = Report(
        "engine",
        "Native engine: SmolLM2-135M on the CPU",
        f"{NUM_INPUT} tokens in, {NUM_OUTPUT} out, end of text ignored, greedy. headrace: one native replica "
        f"with {NUM_THREADS} threads, closed loop straight to its front over HTTP. transformers: the same "
        f"weights in bfloat16, {NUM_THREADS} threads, static batches without any server: its best case. The "
        "two run in turns.",
    )
    concurrencies = CONCURRENCY[:2] if is_quick else CONCURRENCY
    rows = []
    endpoint = {"model": MODEL, "replicas": 1, "native": {"num_threads": NUM_THREADS}}
    with serve(endpoint) as system, transformers_peer() as peer:
        for concurrency in concurrencies:
            ours = measure(system.front_urls[0], concurrency, 1 if is_quick else 3)
            theirs = peer.measure(concurrency)
            rows.append(_row(concurrency, ours, theirs))
            wanted, _ = VLLM[concurrency]
            got = ours.output_tokens_per_s
            report.aims.append(
                Aim(f"tokens/s at {concurrency}", f"above vLLM's {wanted:g}", f"{got:.1f}", got > wanted)
            )
            report.data[str(concurrency)] = {"headrace": msgspec.to_builtins(ours), "transformers": theirs}
        report.data["transformers_load_s"] = peer.load_s
    headers = (
        *("concurrency", "headrace tokens/s", "TPOT p50 ms", "TTFT p50 ms"),
        *("transformers tokens/s", "TPOT ms", "ratio"),
        *("vLLM tokens/s", "TPOT ms", "llama.cpp tokens/s", "TPOT ms"),
    )
    report.tables.append(Table("Output tokens per second", headers, rows))
    report.caveats += [
        "vLLM 0.32 (CPU, bfloat16) and llama.cpp (Q4_1) were measured on another 2-core machine: compare "
        "with care. transformers ran here, in this run.",
        "Our prompts are random words: their token counts are near, not exactly, "
        f"{NUM_INPUT}, and the chat template adds some. Peers' prompts are exactly {NUM_INPUT} tokens.",
        "The client takes a share of the same cores.",
    ]
    return report


def measure(url: str, concurrency: int, rounds: int) -> RunResult:
    """Load the front with `rounds` requests per worker after a warm-up."""
    spec = LoadSpec(
        concurrency=concurrency, max_requests=concurrency * rounds, warmup_requests=concurrency, timeout_s=600
    )
    work = workload(NUM_INPUT, NUM_OUTPUT, seed=concurrency, route="completions")
    return evaluate_valid(load(url, work, spec))


@dataclass
class Peer:
    """A running transformers process."""

    process: subprocess.Popen[str]
    load_s: float = 0.0

    def measure(self, batch: int) -> dict[str, float]:
        """Generate one static batch; return tokens/s and TPOT."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        times = self.read()
        per_token_s = (times["total_s"] - times["first_s"]) / (times["num_output"] - 1)
        return {
            **times,
            "output_tokens_per_s": batch * times["num_output"] / times["total_s"],
            "tpot_ms": per_token_s * 1e3,
        }

    def read(self) -> dict[str, float]:
        """Return the next answer. A peer that takes too long is killed, which ends the wait."""
        assert self.process.stdout is not None
        guard = threading.Timer(PEER_LIMIT_S, self.process.kill)
        guard.start()
        try:
            line = self.process.stdout.readline()
        finally:
            guard.cancel()
        if not line:
            raise RuntimeError("the transformers process ended without an answer")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextmanager
def transformers_peer() -> Iterator[Peer]:
    """Start the peer and load its model; it ends with the block."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transformers_peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(NUM_THREADS)},
    )
    try:
        peer = Peer(process)
        peer.load_s = peer.read()["load_s"]
        yield peer
    finally:
        process.kill()
        process.communicate()


def _row(concurrency: int, ours: RunResult, theirs: dict[str, float]) -> list[str]:
    assert ours.tpot_ms is not None
    assert ours.ttft_ms is not None
    ratio = ours.output_tokens_per_s / theirs["output_tokens_per_s"]
    cells = [
        str(concurrency),
        f"**{ours.output_tokens_per_s:.1f}**",
        f"{ours.tpot_ms.p50:.1f}",
        f"{ours.ttft_ms.p50:.0f}",
        f"{theirs['output_tokens_per_s']:.1f}",
        f"{theirs['tpot_ms']:.1f}",
        f"{ratio:.1f}",
    ]
    known: tuple[Any, Any] = (VLLM[concurrency], LLAMA_CPP[concurrency])
    for figures in known:
        cells += ["died", "-"] if figures is None else [f"{figures[0]:g}", f"{figures[1]:g}"]
    return cells
