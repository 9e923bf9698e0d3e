"""What it costs to hold answers to a form: per token at several batch sizes, and at the first request."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from benchmarks.report import Aim, Report, Table
from benchmarks.system import MODEL
from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import SystemClock
from headrace.engine.constraint import Constraint
from headrace.engine.grammars import GrammarCompiler
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import resolve_model
from headrace.engine.model_files.vocabulary import read_token_bytes
from headrace.engine.process import build_engine
from headrace.engine.protocol import Engine
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.structured_output import OutputForm

NUM_THREADS = 2
BATCHES = (1, 8, 32)
NUM_INPUT, NUM_OUTPUT = 32, 48
AIM_RATIO = 0.03
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "is_member": {"type": "boolean"},
    },
    "required": ["name", "age", "colours", "is_member"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 100}
"""Longer than any answer here, so that all have the same length."""
FORMS = {
    "JSON schema (array of objects)": OutputForm("json", json.dumps(PEOPLE), ""),
    "any JSON object": OutputForm("json", '{"type": "object"}', ""),
    "choice of 1,000": OutputForm("choice", json.dumps([f"option {i}" for i in range(1000)]), ""),
    "pattern": OutputForm("regex", r"(\w{1,12}@\w{1,12}\.(com|org), ){100}", ""),
    "enum of 5,000": OutputForm("json", json.dumps({"enum": [f"value {i}" for i in range(5000)]}), ""),
}
_ids = count()


def run(*, is_quick: bool) -> Report:
    """Measure steps with and without a form in turns, then masks alone, then compilation."""
    rounds = 1 if is_quick else 5
    report = Report(
        "structured",
        "Structured output: what a form costs",
        f"One engine in this process, {NUM_THREADS} threads, SmolLM2-135M; {NUM_INPUT} tokens in, "
        f"{NUM_OUTPUT} out, greedy. Batches that are free and batches that must be a JSON array of objects "
        f"take turns, {rounds} times; a step's time is the fastest quarter's median, since other processes "
        "only lengthen it. Masks: CPU time of mask and advance along an answer.",
    )
    grammars, latencies = asyncio.run(compile_forms())
    engine = build_engine(
        EngineSpec(
            "native", MODEL, max_running=max(BATCHES), num_threads=NUM_THREADS, kv_cache_bytes=128 << 20
        ),
        lambda _phase: None,
        SystemClock(),
    )
    schema = grammars["JSON schema (array of objects)"]
    first_ms = [1e3 * first_token_s(engine, grammar) for grammar in ("", schema, schema)]
    rows = []
    for batch in BATCHES:
        free, held = measure_steps(engine, batch, schema, rounds)
        ratio = held / free - 1
        rows.append((str(batch), f"{1e3 * free:.2f}", f"{1e3 * held:.2f}", f"{100 * ratio:+.1f}%"))
        met = ratio <= AIM_RATIO
        report.aims.append(Aim(f"longer steps at {batch}", "at most 3%", f"{100 * ratio:+.1f}%", met))
        report.data[f"step_s at {batch}"] = {"free": free, "held": held}
    report.tables.append(Table("A step", ("requests", "free, ms", "JSON schema, ms", "longer by"), rows))
    masks = {name: measure_masks(grammar) for name, grammar in grammars.items()}
    report.data |= {"mask_us": masks, "compile_ms": latencies, "first_token_ms": first_ms}
    names = ("mean", "worst", "compile")
    report.tables.append(
        Table(
            "Mask and advance along an answer, one request, µs of CPU; compiling in the engine, ms",
            ("form", "tokens", "mean, µs", "worst, µs", "compile, ms"),
            [(k, f"{v['tokens']:.0f}", *(f"{v[name]:.1f}" for name in names)) for k, v in masks.items()],
        )
    )
    report.tables.append(
        Table(
            "A form's first time in the front: tried in the worker, ms",
            ("form", "first", "again (cached)"),
            [(name, f"{first:.1f}", f"{again:.3f}") for name, (first, again) in latencies.items()],
        )
    )
    report.tables.append(
        Table(
            "First token in the engine, ms",
            ("free", "first form (library and vocabulary)", "next one"),
            [tuple(f"{value:.0f}" for value in first_ms)],
        )
    )
    report.caveats.append(
        "The first form of all includes the start of the grammar worker's process. Which form is first: "
        f"{next(iter(FORMS))}."
    )
    return report


async def compile_forms() -> tuple[dict[str, str], dict[str, tuple[float, float]]]:
    """Return each form's grammar, and milliseconds for it the first and the second time."""
    checker = GrammarChecker()
    grammars, latencies = {}, {}
    for name, form in FORMS.items():
        begin_s = time.perf_counter()
        grammars[name] = await checker.compile(form)
        middle_s = time.perf_counter()
        await checker.compile(form)
        latencies[name] = (1e3 * (middle_s - begin_s), 1e3 * (time.perf_counter() - middle_s))
    await checker.close()
    return grammars, latencies


def submit(engine: Engine, grammar: str, num_output: int) -> None:
    """Send one request with a prompt of its own, so that nothing is cached."""
    number = next(_ids)
    prompt = [1000 + (number * 7919 + i * 104729) % 40000 for i in range(NUM_INPUT)]
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    engine.submit(GenerationRequest(f"r{number}", prompt, sampling, grammar=grammar))


def first_token_s(engine: Engine, grammar: str) -> float:
    """Return the seconds to the first token of a request alone."""
    begin_s = time.perf_counter()
    submit(engine, grammar, 1)
    while engine.has_work():
        engine.step()
    return time.perf_counter() - begin_s


def measure_steps(engine: Engine, batch: int, grammar: str, rounds: int) -> tuple[float, float]:
    """Return the seconds of a decoding step with `batch` requests, free and held to `grammar`."""
    times: dict[str, list[float]] = {"": [], grammar: []}
    for _ in range(rounds):
        for kind, seconds in times.items():
            for _ in range(batch):
                submit(engine, kind, NUM_OUTPUT)
            while engine.has_work():
                begin_s = time.perf_counter()
                outputs = engine.step().outputs
                if len(outputs) == batch and not any(output.finish_reason for output in outputs):
                    seconds.append(time.perf_counter() - begin_s)
    return fastest(times[""]), fastest(times[grammar])


def fastest(seconds: Sequence[float]) -> float:
    """Return the median of the fastest quarter."""
    return statistics.median(sorted(seconds)[: max(1, len(seconds) // 4)])


def measure_masks(grammar: str) -> dict[str, float]:
    """Follow a plausible answer through a grammar: mean and worst µs of mask and advance, ms to compile."""
    metadata = read_metadata(resolve_model(MODEL))
    token_bytes = read_token_bytes(metadata)
    compiler = GrammarCompiler(lambda: token_bytes, metadata.eos_token_ids)
    compiler.constrain(
        '{"grammars": [{"lark_grammar": "start: /a/"}]}', ()
    )  # the vocabulary is not the form's
    begin_s = time.process_time()
    constraint, error = compiler.constrain(grammar, ())
    compile_s = time.process_time() - begin_s
    assert constraint is not None, error
    times = follow(constraint, plausible_logits(token_bytes), sorted(metadata.eos_token_ids))
    mean_us, worst_us = 1e6 * statistics.mean(times), 1e6 * max(times)
    return {"tokens": len(times), "mean": mean_us, "worst": worst_us, "compile": 1e3 * compile_s}


def plausible_logits(token_bytes: Sequence[bytes]) -> Any:
    """Return logits that prefer plain words, with some noise: long answers, not line ends."""
    noise = np.random.default_rng(1).normal(0, 2, len(token_bytes)).astype(np.float32)
    words = [4.0 if data.strip().isalnum() and data.isascii() else 0.0 for data in token_bytes]
    return noise + np.array(words, np.float32)


def follow(constraint: Constraint, logits_V: Any, end_token_ids: Sequence[int]) -> list[float]:
    """Return seconds of CPU of mask and advance for up to 200 tokens."""
    times: list[float] = []
    generator = np.random.default_rng(2)
    while len(times) < 200 and not constraint.is_complete:
        row_V = np.roll(logits_V, int(generator.integers(len(logits_V))))
        begin_s = time.thread_time()
        constraint.compute_mask(())
        masked_s = time.thread_time()
        row_V = constraint.apply(row_V)
        token_id = int(row_V.argmax())
        if row_V[token_id] == -np.inf or token_id in end_token_ids:
            break
        chosen_s = time.thread_time()
        constraint.advance(token_id)
        times.append(masked_s - begin_s + time.thread_time() - chosen_s)
    return times
