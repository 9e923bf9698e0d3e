"""Perplexity of the fast arithmetics against float32, on our documents and Python's docstrings.

    python -m benchmarks.quality [MODEL ...] [--sequences 16] [--json FILE]

Every arithmetic reads the same tokens, in sequences of 256 after the model's first token. "agrees" is the
share of places where its most likely next token is float32's.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import functools
import inspect
import json
import logging
import math
import pathlib
import statistics
import string
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import resolve_model
from headrace.engine.protocol import StepInput
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.replica.text_model import load_text_model

SEQUENCE_TOKENS = 256
BLOCK_SIZE = 16
ARITHMETICS = ("float32", "bfloat16", "int8")
_MODULES = (
    argparse,
    asyncio,
    collections,
    functools,
    json,
    logging,
    pathlib,
    statistics,
    string,
    tempfile,
    threading,
)
_LEAST_CHARACTERS = 200
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Quality:
    """One arithmetic's result."""

    path: str
    perplexity: float
    agreement: float
    """Share of places where the most likely next token is the yardstick's."""


def prose() -> Iterator[str]:
    """Paragraphs and docstrings, one from each in turn, always in the same order."""
    documents = [path.read_text("utf-8") for path in sorted((_ROOT / "docs").rglob("*.md"))]
    paragraphs = [
        paragraph
        for document in documents
        for paragraph in document.split("\n\n")
        if len(paragraph) >= _LEAST_CHARACTERS and "|" not in paragraph and "```" not in paragraph
    ]
    docstrings = []
    for module in _MODULES:
        for _, value in sorted(vars(module).items()):
            if inspect.isclass(value) or inspect.isfunction(value):
                text = inspect.getdoc(value) or ""
                if len(text) >= _LEAST_CHARACTERS:
                    docstrings.append(text)
    for pair in zip(paragraphs, docstrings):
        yield from pair


def sequences(model: str, count: int) -> list[list[int]]:
    """The first `count` sequences of SEQUENCE_TOKENS tokens of `prose`; each begins as the model wants."""
    tokenizer = load_text_model(EngineSpec("native", model)).tokenizer
    first = read_metadata(resolve_model(model)).bos_token_id
    start = [] if first is None else [first]
    size = SEQUENCE_TOKENS - len(start)
    found: list[list[int]] = []
    tokens: list[int] = []
    for text in prose():
        tokens += tokenizer.encode(text + "\n\n", add_special_tokens=False)
        while len(tokens) >= size:
            found.append(start + tokens[:size])
            tokens = tokens[size:]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"the prose gives {len(found)} sequences, {count} are asked for")


def all_logits(runner: DecoderRunner, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits after every token, float32 [len(token_ids), vocab_size]."""
    num = len(token_ids)
    positions = np.arange(num, dtype=np.int32)
    batch = StepInput(
        token_ids_T=np.array(token_ids, np.int32),
        positions_T=positions,
        slots_T=positions,
        query_starts=np.array([0, num], np.int32),
        context_lengths_R=np.array([num], np.int32),
        block_tables=[list(range(-(-num // runner.block_size)))],
        sampled_rows_S=positions,
    )
    logits: torch.Tensor = runner.execute(batch)
    return logits


def measure(
    model: str, arithmetics: Sequence[str], texts: list[list[int]], num_threads: int = 0
) -> list[Quality]:
    """Perplexity of each arithmetic; the first is the yardstick of the agreement."""
    yardstick: list[torch.Tensor] = []
    results = []
    for dtype in arithmetics:
        spec: Any = {
            "dtype": dtype,
            "block_size": BLOCK_SIZE,
            "kv_cache_bytes": 64 << 20,
            "num_threads": num_threads,
        }
        runner = load_runner(
            EngineSpec("native", model, max_context_tokens=SEQUENCE_TOKENS, **spec),
            resolve_model(model),
            on_phase=lambda phase: None,
        )
        loss, agreed, best = 0.0, 0, []
        for index, text in enumerate(texts):
            logits = all_logits(runner, text)
            targets = torch.tensor(text[1:])
            loss += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
            best.append(logits.argmax(-1))
            if not yardstick or len(yardstick) <= index:
                yardstick.append(best[-1])
            agreed += int((best[-1] == yardstick[index]).sum())
        num_tokens = sum(map(len, texts))
        results.append(Quality(runner.path, math.exp(loss / (num_tokens - len(texts))), agreed / num_tokens))
    return results


def main() -> None:
    """Print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["smollm2-135m-instruct"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {}
    for model in arguments.models:
        found = measure(model, ARITHMETICS, sequences(model, arguments.sequences))
        report[model] = [asdict(each) for each in found]
        print(f"{model}, {arguments.sequences} sequences of {SEQUENCE_TOKENS} tokens")
        for each in found:
            change = each.perplexity / found[0].perplexity - 1
            figures = f"{each.perplexity:8.4f} {change:+7.2%}  agrees {each.agreement:.2%}"
            print(f"  {each.path:32} perplexity {figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
