"""The native engine's throughput and latencies, beside other engines in the same run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from benchmarks.engines.company import Company, company
from benchmarks.engines.load import Load, measure, workload_for
from benchmarks.engines.models import GEMMA, SMOLLM2, BenchModel, ModelMissing
from benchmarks.engines.page import engines_table, failures_of, ratio
from benchmarks.engines.running import HEADRACE, RunningEngine
from benchmarks.report import Aim, Report, Table

NUM_INPUT = NUM_OUTPUT = 128
CONTEXT_TOKENS = 512
VLLM = "vllm"


@dataclass(frozen=True)
class Plan:
    """What is measured how often."""

    aims: dict[BenchModel, tuple[float, float]]
    """Model -> how many times vLLM's tokens/s, how many times the best peer's."""
    concurrencies: tuple[int, ...]
    rounds: int
    repeat_limit_s: float
    """A load that takes longer is not repeated: the run shall end in minutes."""


AIMS = {SMOLLM2: (4.0, 1.3), GEMMA: (3.0, 1.0)}
FULL = Plan(AIMS, (1, 4, 16, 32), 3, 15.0)
QUICK = Plan({SMOLLM2: AIMS[SMOLLM2]}, (1, 16), 1, 15.0)


@dataclass
class Loads:
    """What one model's turns gave."""

    model: BenchModel
    company: Company
    by_concurrency: dict[int, dict[str, list[Load]]] = field(default_factory=dict)

    def middle(self, concurrency: int, name: str) -> Load | None:
        """Return the load of median tokens/s; of two the slower one. None without any."""
        loads = sorted(self.by_concurrency[concurrency].get(name, []), key=lambda load: load.tokens_per_s)
        return loads[(len(loads) - 1) // 2] if loads else None


def run(*, is_quick: bool, only: Sequence[str] = ()) -> Report:
    """Compare with all engines that are installed, or with those named. Raises UnknownPeer."""
    plan = QUICK if is_quick else FULL
    words = ["python -m benchmarks engine", *(["--quick"] if is_quick else [])]
    words += [f"--only {','.join(only)}"] if only else []
    report = Report("engine", "Native engine on the CPU", _METHOD, command=" ".join(words))
    for model, aims in plan.aims.items():
        print(f"-- {model.title}", file=sys.stderr, flush=True)
        try:
            loads = compare(model, plan, only)
        except ModelMissing as error:
            report.caveats.append(str(error))
            continue
        report.tables += [_table(loads, plan), engines_table(model, loads.company)]
        report.aims += _aims(loads, plan, *aims)
        report.caveats += failures_of(model, loads.company)
        report.data[model.name] = _data(loads)
    report.caveats += _CAVEATS
    return report


def compare(model: BenchModel, plan: Plan, only: Sequence[str]) -> Loads:
    """Measure one model on every engine, in turns. Raises ModelMissing, UnknownPeer."""
    with company(model, only, CONTEXT_TOKENS) as together:
        loads = Loads(model, together)
        for concurrency in plan.concurrencies:

            def ask(engine: RunningEngine, number: int, concurrency: int = concurrency) -> Load:
                # Other prompts each round: a prefix cache holds none of them.
                work = workload_for(engine, NUM_INPUT, NUM_OUTPUT, seed=1000 * concurrency + number)
                return measure(engine, work, concurrency, concurrency)

            loads.by_concurrency[concurrency] = together.take_turns(
                plan.rounds, f"{model.title} at {concurrency}", ask, plan.repeat_limit_s
            )
            _tell(loads, concurrency)
        return loads


def _tell(loads: Loads, concurrency: int) -> None:
    found = {name: loads.middle(concurrency, name) for name in loads.by_concurrency[concurrency]}
    words = [f"{name} {load.tokens_per_s:.1f}" for name, load in found.items() if load is not None]
    print(f"   {concurrency} at a time, tokens/s: {', '.join(words)}", file=sys.stderr, flush=True)


def _aims(loads: Loads, plan: Plan, than_vllm: float, than_best: float) -> list[Aim]:
    aims = []
    for concurrency in plan.concurrencies:
        found = {name: loads.middle(concurrency, name) for name in loads.by_concurrency[concurrency]}
        rates = {name: load.tokens_per_s for name, load in found.items() if load is not None}
        ours = rates.pop(HEADRACE, 0.0)
        best = max(rates.values(), default=None)
        where = f"{loads.model.title}, tokens/s at {concurrency}"
        for what, times, other in (
            ("vLLM's", than_vllm, rates.get(VLLM)),
            ("the best peer's", than_best, best),
        ):
            measured = "not measured" if other is None else f"{ours:.1f} is {ours / other:.2f} times"
            is_met = other is not None and ours >= times * other
            aims.append(Aim(where, f"at least {times:g} times {what}", measured, is_met))
    return aims


def _table(loads: Loads, plan: Plan) -> Table:
    headers = (
        *("at a time", "engine", "tokens/s", "headrace's ratio", "TTFT p50 ms", "p99"),
        *("ITL p50 ms", "p99", "cores used", "memory MiB", "rounds"),
    )
    rows = []
    for concurrency in plan.concurrencies:
        ours = loads.middle(concurrency, HEADRACE)
        for name, repeated in loads.by_concurrency[concurrency].items():
            load = loads.middle(concurrency, name)
            if load is not None:
                rows.append(_row(concurrency, name, load, ours, len(repeated)))
    title = f"{loads.model.title}: {NUM_INPUT} tokens in, {NUM_OUTPUT} out, closed loop"
    return Table(title, headers, rows)


def _row(concurrency: int, name: str, load: Load, ours: Load | None, rounds: int) -> list[str]:
    result = load.result
    assert result.ttft_ms is not None
    assert result.itl_ms is not None
    is_ours = name == HEADRACE
    return [
        str(concurrency),
        name,
        f"**{load.tokens_per_s:.1f}**" if is_ours else f"{load.tokens_per_s:.1f}",
        "" if is_ours else ratio(ours.tokens_per_s if ours else None, load.tokens_per_s),
        f"{result.ttft_ms.p50:.0f}",
        f"{result.ttft_ms.p99:.0f}",
        f"{result.itl_ms.p50:.1f}",
        f"{result.itl_ms.p99:.1f}",
        f"{load.cpu_s / result.elapsed_s:.2f}",
        f"{load.memory_bytes / 2**20:.0f}",
        str(rounds),
    ]


def _data(loads: Loads) -> dict[str, Any]:
    return {
        str(concurrency): {name: msgspec.to_builtins(found) for name, found in by_engine.items()}
        for concurrency, by_engine in loads.by_concurrency.items()
    }


_METHOD = (
    f"Text prompts of {NUM_INPUT} tokens, {NUM_OUTPUT} tokens out, end of text ignored, greedy: the same "
    "bytes for every engine, straight to its own OpenAI server, from one client on the same machine. Each "
    "engine computes with two threads on the machine's two cores and has room for 32 answers; all read the "
    "same GGUF file, or what it was converted to. All are started; in turns one runs while the others are "
    "stopped (SIGSTOP). One load is as many requests as go on at a time; the one of median tokens/s "
    f"counts; one that takes longer than {FULL.repeat_limit_s:g} s is not repeated."
)
_CAVEATS = [
    "The client takes a share of the same cores.",
    "Weights are of one file, but not of the same bits: what each engine keeps them in stands in its row.",
    "One wave of requests: all prompts come at once, so TTFT at 16 and 32 is that of a burst.",
]
