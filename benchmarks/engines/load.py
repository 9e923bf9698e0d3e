"""What is asked of an engine, and what one load of it gave.

Owns prompts of exact length and the figures of one load. Must not know which engine it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec

from benchmarks.engines.running import RunningEngine
from headrace.bench.load import LoadRun, LoadSpec, WarmupFailed, run_load
from headrace.bench.record import ErrorKind
from headrace.bench.results import RunResult, evaluate
from headrace.bench.target import parse_target
from headrace.bench.workload import ROUTE_PATHS, Lengths, Workload

REQUEST_LIMIT_S = 180.0


class LoadFailed(Exception):
    """Requests failed: a figure over failures means nothing. The message has the first failure."""


@dataclass(frozen=True, slots=True)
class ExactWorkload(Workload):
    """Text prompts of exactly as many tokens as asked, for vocabularies that have each word of the workload,
    with the space before it, as one token: SmolLM2's and Gemma's do. A token for the beginning of the text,
    which Gemma's tokenizer adds, comes on top. Every server tokenizes for itself."""

    def body(self, index: int) -> bytes:
        tree = json.loads(super(ExactWorkload, self).body(index))
        tree["prompt"] = " " + tree["prompt"]
        return json.dumps(tree, separators=(",", ":")).encode()


class Load(msgspec.Struct, frozen=True):
    """One load of one engine."""

    result: RunResult
    cpu_s: float
    """CPU seconds of the engine's processes during the load."""
    memory_bytes: int
    """After it."""

    @property
    def tokens_per_s(self) -> float:
        return self.result.output_tokens_per_s


def workload_for(engine: RunningEngine, num_input: int, num_output: int, seed: int) -> ExactWorkload:
    """Return greedy completions of exact lengths. Of one seed they are the same for every engine."""
    return ExactWorkload(
        engine.served_name,
        "completions",
        input_tokens=Lengths("fixed", num_input),
        output_tokens=Lengths("fixed", num_output),
        ignore_eos=engine.takes_ignore_eos,
        seed=seed,
    )


def measure(engine: RunningEngine, work: Workload, concurrency: int, num_requests: int) -> Load:
    """Load an engine in a closed loop. Raises LoadFailed unless every answer came, as long as asked."""
    spec = LoadSpec(concurrency=concurrency, max_requests=num_requests, timeout_s=REQUEST_LIMIT_S)
    cpu_s = engine.cpu_s()
    run = run_checked(engine, work, spec)
    return Load(evaluate(run), engine.cpu_s() - cpu_s, engine.memory_bytes())


def run_checked(engine: RunningEngine, work: Workload, spec: LoadSpec) -> LoadRun:
    """Run one load. Raises LoadFailed."""
    try:
        run = run_load(parse_target(engine.url, ROUTE_PATHS[work.route]), work, spec)
    except WarmupFailed as error:
        raise LoadFailed(str(error)) from error
    wanted = int(work.output_tokens.a)
    for record in run.records:
        if not engine.says_done and record.error == ErrorKind.CUT and record.num_output_tokens == wanted:
            record.error, record.is_done = "", True
    failed = [record for record in run.records if not record.is_ok]
    if failed:
        first = failed[0]
        raise LoadFailed(f"{len(failed)} of {len(run.records)} failed: {first.error}: {first.error_detail}")
    short = [record.num_output_tokens for record in run.records if record.num_output_tokens != wanted]
    if any(not record.token_times for record in run.records):
        raise LoadFailed("an answer came without any text")
    if short:
        raise LoadFailed(f"{len(short)} answers have not the {wanted} tokens asked for, one has {short[0]}")
    return run
