"""What a step costs beside the model: the engine's Python around it, and the front's part of each step."""

from __future__ import annotations

import socket
import statistics
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import cpu_window
from benchmarks.report import Aim, Report, Table
from benchmarks.system import MODEL, load, serve, simulated, workload
from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.bench.load import LoadSpec
from headrace.clock import SystemClock
from headrace.engine.channel import FrontChannel
from headrace.engine.fused_sampling import load_fused_sampling
from headrace.engine.kv_file import KvFile
from headrace.engine.native import NativeEngine
from headrace.engine.protocol import StepInput
from headrace.engine.sampler import Sampler

BATCH = 32
VOCAB_SIZE = 49_152
BLOCK_SIZE = 16
AIM_RATIO = 0.05
FRONT_STEP_MS = 15.0
"""Of the simulated engine behind the front that is measured: steps alike, whatever else runs."""
PHASES = ("commands", "schedule", "lay out", "sample", "account", "update", "load", "send")
GREEDY = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "temperature 0.7, top_p 0.9": SamplingParams(
        max_tokens=100_000, temperature=0.7, top_p=0.9, ignore_eos=True
    ),
    "repetition and frequency penalties": SamplingParams(
        max_tokens=100_000,
        temperature=0.0,
        ignore_eos=True,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
    ),
}


class CannedRunner:
    """A ModelRunner without a model: the same rows of logits for every step, one per request."""

    architecture = path = "canned"
    vocab_size, block_size = VOCAB_SIZE, BLOCK_SIZE
    eos_token_ids: frozenset[int] = frozenset()
    kv_file: KvFile | None = None

    def __init__(self, max_context_tokens: int) -> None:
        self.max_context_tokens = max_context_tokens
        self.num_blocks = BATCH * (max_context_tokens // BLOCK_SIZE + 1)
        source = np.random.default_rng(1)
        ranks = np.stack([source.permutation(VOCAB_SIZE) + 1 for _ in range(BATCH)])
        # The probability of the token of rank r falls with r^1.3, as in texts.
        self._logits_SV = torch.from_numpy((-1.3 * np.log(ranks)).astype(np.float32))

    def execute(self, batch: StepInput) -> Any:
        """Return as many rows as are wanted."""
        return self._logits_SV[: len(batch.sampled_rows_S)]

    def check_health(self) -> None:
        """Nothing that it computes with can be lost."""

    def sleep(self, level: int) -> None:
        """Nothing to give back."""

    def wake(self) -> None:
        """Nothing to take."""


class Stopwatch:
    """Times what functions take, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def watch(self, owner: object, name: str, phase: str) -> None:
        """From now on, add each call of owner.name to `phase`."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            begin_ns = time.thread_time_ns()
            try:
                return inner(*arguments, **options)
            finally:
                self.steps[-1][phase] += time.thread_time_ns() - begin_ns

        setattr(owner, name, timed)

    def begin_step(self) -> None:
        self.steps.append(defaultdict(int))

    def median_us(self, phase: str) -> float:
        """Return the usual CPU time of a phase: the median over steps."""
        return statistics.median(step[phase] for step in self.steps) / 1e3


def measure_engine(sampling: SamplingParams, num_context: int, num_steps: int) -> dict[str, float]:
    """Return the µs per step of each phase, for a batch that decodes with `num_context` tokens each."""
    runner = CannedRunner(num_context + num_steps + 64)
    spec = EngineSpec("native", "canned", max_running=BATCH, token_budget=4096, block_size=BLOCK_SIZE)
    engine = NativeEngine(spec, runner, SystemClock(), sampler=Sampler(load_fused_sampling()))
    source = np.random.default_rng(2)
    for number in range(BATCH):
        prompt = source.integers(0, VOCAB_SIZE, num_context).tolist()
        engine.submit(GenerationRequest(f"hr-g1-{number:016x}", prompt, sampling))
    while engine.load().num_uncomputed_tokens:
        engine.step()
    stopwatch = Stopwatch()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        channel = FrontChannel(ours)
        _watch_all(stopwatch, engine, channel)
        for _ in range(num_steps):
            stopwatch.begin_step()
            begin_ns = time.thread_time_ns()
            channel.receive(0.0)
            channel.send(engine.step())
            stopwatch.steps[-1]["all"] = time.thread_time_ns() - begin_ns
            theirs.recv(1 << 20)
    return {phase: stopwatch.median_us(phase) for phase in (*PHASES, "all")}


def _watch_all(stopwatch: Stopwatch, engine: NativeEngine, channel: FrontChannel) -> None:
    """Time the parts of a step where they are called: the private ones, too."""
    stopwatch.watch(channel, "receive", "commands")
    stopwatch.watch(channel, "send", "send")
    stopwatch.watch(engine._scheduler, "schedule", "schedule")
    stopwatch.watch(engine._builder, "build", "lay out")
    stopwatch.watch(engine._sampler, "sample", "sample")
    stopwatch.watch(engine, "_share_time", "account")
    stopwatch.watch(engine, "_update", "update")
    stopwatch.watch(engine, "load", "load")


def measure_replica(endpoint: dict[str, Any], *, is_quick: bool) -> dict[str, float]:
    """Return the front's CPU time per step and a step's time, in µs, under a closed loop of BATCH streams."""
    ramp_s, window_s = (3.0, 4.0) if is_quick else (10.0, 20.0)
    with serve(endpoint) as system:
        url = system.front_urls[0]
        spec = LoadSpec(concurrency=BATCH, duration_s=ramp_s + window_s + 2, timeout_s=600)
        samples: list[dict[str, float]] = []
        with cpu_window(ramp_s, window_s, on_sample=lambda: samples.append(_engine_metrics(url))) as window:
            load(url, workload(128, 256, route="completions"), spec)
        before, after = samples
        num_steps = after["steps"] - before["steps"]
        spent = window.spent_s()
        return {
            "front": spent["front"] / num_steps * 1e6,
            "step": (after["busy_s"] - before["busy_s"]) / num_steps * 1e6,
            "error_ratio": after["error_ratio"],
        }


def _engine_metrics(front_url: str) -> dict[str, float]:
    address = front_url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return {
        "steps": values["headrace_engine_steps_total"],
        "busy_s": values["headrace_engine_busy_seconds_total"],
        "error_ratio": values["headrace_engine_step_model_error_ratio"],
    }


def run(*, is_quick: bool) -> Report:
    """Measure the engine's Python for each kind of request, then a whole replica."""
    report = Report(
        "overhead",
        "What a step costs beside the model",
        f"{BATCH} requests decode; vocabulary {VOCAB_SIZE:,}. Engine: the real scheduler, sampler and "
        "channel around a model that takes no time, in one thread; medians over steps of its CPU time. "
        f"Front: its process's CPU time per step at {BATCH} streams in a closed loop over HTTP, heads and "
        f"ends of requests included, with an engine of {FRONT_STEP_MS:g} ms steps. The share is engine plus "
        "front over the step of a native replica under the same load.",
    )
    num_steps = 100 if is_quick else 600
    rows = []
    engine_us = {}
    for kind, sampling in KINDS.items():
        for num_context in (256, 4096):
            times = measure_engine(sampling, num_context, num_steps)
            report.data[f"{kind}, {num_context}"] = times
            rows.append([kind, str(num_context), *(f"{times[phase]:.0f}" for phase in (*PHASES, "all"))])
            engine_us[kind, num_context] = times["all"]
    report.tables.append(Table("The engine's µs per step", ("sampling", "context", *PHASES, "all"), rows))
    replica = {"model": MODEL, "replicas": 1, "native": {"max_running": BATCH}}
    native = measure_replica(replica, is_quick=is_quick)
    front = measure_replica(simulated(FRONT_STEP_MS, BATCH), is_quick=is_quick)
    report.data |= {"native replica": native, "simulated replica": front}
    ours_us = engine_us["greedy", 256] + front["front"]
    share = ours_us / native["step"]
    cells = (
        f"{native['step'] / 1e3:.1f}",
        f"{engine_us['greedy', 256]:.0f}",
        f"{front['front']:.0f}",
        f"{share:.1%}",
        f"{native['error_ratio']:.1%}",
    )
    headers = ("native step ms", "engine µs", "front µs", "share", "step model's error")
    report.tables.append(Table("One replica, greedy", headers, [cells]))
    aim = f"at most {AIM_RATIO:.0%}"
    report.aims.append(Aim(f"scheduler + front share at {BATCH}", aim, f"{share:.1%}", share <= AIM_RATIO))
    grows = engine_us["greedy", 4096] / engine_us["greedy", 256]
    report.aims.append(
        Aim("engine's µs at a context of 4,096 over 256", "at most 1.1", f"{grows:.2f}", grows <= 1.1)
    )
    report.caveats += [
        "The load's client takes part of the same cores, which lengthens the native replica's steps.",
        "Of the engine's parts only reading commands does not wait for the step's tokens: a second thread "
        "that reads them while the model runs would hide that alone, and take a core from the model's.",
    ]
    return report
