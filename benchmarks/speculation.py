"""What speculation gains: code, summaries and chat, one stream and eight, with and without drafts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.report import Aim, Report, Table
from benchmarks.system import ENDPOINT, MODEL, System, evaluate_valid, load, serve
from headrace.bench.load import LoadSpec
from headrace.bench.workload import Route, Workload

ROOT = Path(__file__).parents[1]
NUM_OUTPUT = 160
NUM_TEXTS = 8
NUM_ROUNDS = 3
CONCURRENCY = (1, 8)
CODE_CHARACTERS = 2400
TOPICS = (
    *("the sea", "cooking rice", "a trip to Rome", "why the sky is blue"),
    *("learning the piano", "how bread rises", "planting trees", "a rainy day"),
)
AIMS = {("code", 1): 1.6, ("code", 8): 1.2, ("summaries", 1): 1.6, ("summaries", 8): 1.2}
LEAST_ON_CHAT = 0.97
"""Not slower, within the noise of the measurement."""


@dataclass(frozen=True, slots=True)
class Texts(Workload):
    """Requests with given prompts, one after another and from the start again."""

    prompts: tuple[str, ...] = ()

    def body(self, index: int) -> bytes:
        """Return request `index`. Warm-up requests are the same ones, so that all prompts are cached."""
        prompt = self.prompts[index % len(self.prompts)]
        content: Any = [{"role": "user", "content": prompt}] if self.route == "chat" else prompt
        tree = {
            "model": self.model,
            "messages" if self.route == "chat" else "prompt": content,
            "max_tokens": NUM_OUTPUT,
            "temperature": self.temperature,
            "seed": index % len(self.prompts),
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": self.ignore_eos,
        }
        return json.dumps(tree).encode()


def run(*, is_quick: bool) -> Report:
    """Measure each kind of text at each concurrency."""
    report = Report(
        "speculation",
        "Speculation by n-grams: SmolLM2-135M on the CPU",
        "Two native replicas, alike but that one has `speculation: {method: ngram}`, loaded in turns "
        "over HTTP, straight at their fronts. Code: this repository's files continued, greedy. Summaries: of "
        "its documents, greedy. Chat: short questions at temperature 0.8, where little repeats. "
        f"{NUM_TEXTS} prompts of a kind, up to {NUM_OUTPUT} tokens each; prompts are in the prefix cache, so "
        "that decoding is what is measured. Medians of the rounds; the ratio is the median of their ratios.",
    )
    kinds = workloads()
    rows = []
    native = {"max_running": 16}
    drafting = {**native, "speculation": {"method": "ngram"}}
    with (
        serve({"model": MODEL, "replicas": 1, "native": native}) as plain,
        serve({"model": MODEL, "replicas": 1, "native": drafting}) as speculating,
    ):
        for name, work in kinds.items():
            for concurrency in CONCURRENCY:
                figures = measure(plain, speculating, work, concurrency, 1 if is_quick else NUM_ROUNDS)
                rows.append(_row(name, concurrency, figures))
                least = AIMS.get((name, concurrency), LEAST_ON_CHAT)
                ratio = figures["ratio"]
                report.aims.append(
                    Aim(f"{name}, {concurrency} at a time", f"≥ {least:g}x", f"{ratio:.2f}x", ratio >= least)
                )
                report.data[f"{name} {concurrency}"] = figures
        num_same = sum(same_answers(plain, speculating, work) for work in kinds.values())
    report.data["same_answers"] = num_same
    num_texts = sum(len(work.prompts) for work in kinds.values())
    report.aims.append(
        Aim("answers the same, with and without", "all", f"{num_same} of {num_texts}", num_same == num_texts)
    )
    headers = ("text", "at a time", "tokens/s without", "with", "ratio", "drafts per token", "acceptance")
    report.tables.append(Table("Output tokens per second", headers, rows))
    report.caveats += [
        "A small model repeats itself more than a large one, above all when it is greedy.",
        "In bfloat16 a row's logits depend a little on the number of rows in its step, so that an answer may "
        "part from the other where two tokens are nearly equally likely; in int8 it does not.",
    ]
    return report


def workloads() -> dict[str, Texts]:
    """Return the kinds of text, from the repository itself, always the same."""
    source = random.Random(1)
    code = source.sample(_large_files("src", "*.py"), NUM_TEXTS)
    documents = source.sample(_large_files(".", "*.md"), NUM_TEXTS)
    summaries = [
        f"Summarize the following text in a few sentences.\n\n{path.read_text()[:CODE_CHARACTERS]}"
        for path in documents
    ]
    return {
        "code": _texts("completions", [path.read_text()[:CODE_CHARACTERS] for path in code], 0.0),
        "summaries": _texts("chat", summaries, 0.0),
        "chat": _texts("chat", [f"Tell me something about {topic}." for topic in TOPICS], 0.8),
    }


def _large_files(folder: str, pattern: str) -> list[Path]:
    hidden = re.compile(r"(^|/)\.")
    paths = sorted((ROOT / folder).rglob(pattern))
    relative = [path for path in paths if not hidden.search(str(path.relative_to(ROOT)))]
    return [path for path in relative if path.stat().st_size > CODE_CHARACTERS]


def _texts(route: Route, prompts: Sequence[str], temperature: float) -> Texts:
    is_code = route == "completions"
    return Texts(ENDPOINT, route, ignore_eos=is_code, temperature=temperature, prompts=tuple(prompts))


def measure(
    plain: System, speculating: System, work: Texts, concurrency: int, num_rounds: int
) -> dict[str, float]:
    """Load both in turns; return tokens per second of each, their ratio, and what became of the drafts."""
    spec = LoadSpec(
        concurrency=concurrency, max_requests=2 * NUM_TEXTS, warmup_requests=NUM_TEXTS, timeout_s=600
    )
    without, with_drafts = [], []
    before = _drafts(speculating)
    num_tokens = 0
    for _ in range(num_rounds):
        without.append(evaluate_valid(load(plain.front_urls[0], work, spec)).output_tokens_per_s)
        result = evaluate_valid(load(speculating.front_urls[0], work, spec))
        with_drafts.append(result.output_tokens_per_s)
        num_tokens += result.output_tokens * 3 // 2  # and those of the warm-up
    num_drafts, num_accepted = (now - then for now, then in zip(_drafts(speculating), before, strict=True))
    return {
        "without": median(without),
        "with": median(with_drafts),
        "ratio": median(b / a for a, b in zip(without, with_drafts, strict=True)),
        "drafts_per_token": num_drafts / num_tokens,
        "acceptance": num_accepted / max(num_drafts, 1),
    }


def same_answers(plain: System, speculating: System, work: Texts) -> int:
    """Return how many prompts get the same answer from both."""
    path = "chat/completions" if work.route == "chat" else "completions"
    num_same = 0
    for index in range(len(work.prompts)):
        body = {**json.loads(work.body(index)), "stream": False}
        del body["stream_options"]
        answers = []
        for system in (plain, speculating):
            answer = httpx.post(f"{system.front_urls[0]}/{path}", json=body, timeout=600).raise_for_status()
            answers.append((answer.json()["choices"], answer.json()["usage"]["completion_tokens"]))
        num_same += answers[0] == answers[1]
    return num_same


def _drafts(system: System) -> tuple[float, float]:
    """Return the drafts and the accepted ones since the engine's start."""
    text = httpx.get(system.front_urls[0].removesuffix("/v1") + "/metrics", timeout=30).text
    names = ("draft", "accepted")
    found = [
        re.search(rf"^headrace_spec_decode_num_{name}_tokens_total\S* (\S+)$", text, re.M) for name in names
    ]
    num_drafts, num_accepted = (0.0 if match is None else float(match[1]) for match in found)
    return num_drafts, num_accepted


def _row(name: str, concurrency: int, figures: dict[str, float]) -> list[str]:
    return [
        name,
        str(concurrency),
        f"{figures['without']:.1f}",
        f"{figures['with']:.1f}",
        f"**{figures['ratio']:.2f}**",
        f"{figures['drafts_per_token']:.2f}",
        f"{figures['acceptance']:.0%}",
    ]
