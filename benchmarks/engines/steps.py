"""Times decode steps of the native engine without any server, in a process of its own.

`python -m benchmarks.engines.steps --help`. Prints one line of JSON per batch size.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

from benchmarks.engines.models import MODELS, BenchModel
from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import SystemClock
from headrace.engine.native import NativeEngine
from headrace.engine.runner import DecoderRunner, load_runner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--context", type=int, default=256, help="tokens per request, mean over the steps")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    spec = EngineSpec(
        kind="native",
        model=str(model.gguf()),
        max_running=max(arguments.batches),
        # All prompts in one step: afterwards every request has the same context.
        token_budget=max(arguments.batches) * arguments.context,
        max_context_tokens=2 * (arguments.context + arguments.steps),
        num_threads=arguments.threads,
        dtype=arguments.dtype,
    )
    runner = load_runner(spec, model.find(), lambda _: None)
    engine = NativeEngine(spec, runner, SystemClock())
    engine.compute_first_step()
    for batch in arguments.batches:
        times_s = measure(engine, model, batch, arguments.context, arguments.steps)
        print(json.dumps(describe(runner, batch, times_s)), flush=True)
    return 0


def measure(engine: NativeEngine, model: BenchModel, batch: int, context: int, steps: int) -> list[float]:
    """Return the seconds of each step in which `batch` requests decode. Half of the steps have a shorter
    context than `context`, half a longer one."""
    source = random.Random(batch)
    first, last = model.token_range
    for number in range(batch):
        tokens = [source.randrange(first, last) for _ in range(context - steps // 2)]
        sampling = SamplingParams(max_tokens=4 * steps, temperature=0.0, ignore_eos=True)
        engine.submit(GenerationRequest(f"{batch}-{number}", tokens, sampling))
    while engine.load().num_uncomputed_tokens:
        engine.step()
    times_s = []
    for _ in range(steps):
        started_s = time.perf_counter()
        outputs = engine.step().outputs
        times_s.append(time.perf_counter() - started_s)
        assert len(outputs) == batch, f"{len(outputs)} of {batch} requests had a token"
    for number in range(batch):
        engine.abort(f"{batch}-{number}")
    return times_s


def describe(runner: DecoderRunner, batch: int, times_s: list[float]) -> dict[str, Any]:
    return {
        "batch": batch,
        "path": runner.path,
        "times_s": times_s,
        # Of the memory itself: what keys and values are kept in is the engine's own affair.
        "kv_bytes_per_token": runner._kv_bytes // (runner.num_blocks * runner.block_size),
    }


if __name__ == "__main__":
    sys.exit(main())
