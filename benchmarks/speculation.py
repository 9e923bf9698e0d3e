"""What speculation gains: code, summaries and chat, one stream and eight, with and without drafts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.report import Aim, Report, Table
from benchmarks.system import ENDPOINT, MODEL, System, evaluate_valid, load, serve
from headrace.bench.load import LoadRun, LoadSpec
from headrace.bench.workload import Route, Workload

ROOT = Path(__file__).parents[1]
NUM_OUTPUT = 128
NUM_TEXTS = 8
NUM_ROUNDS = 2
NUM_REQUESTS = {1: 3, 8: 24}
"""At a time -> in all, per round: seconds each."""
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
        """Return request `index`."""
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
        f"{NUM_TEXTS} prompts of a kind, up to {NUM_OUTPUT} tokens each; each was asked once before, which "
        "compares the answers and leaves prompts in the prefix cache, so that decoding is what is measured. "
        "Tokens per second until the last request is sent: as many as said go on all the time. Medians of the"
        " rounds, whose order alternates; the ratio is the median of their ratios.",
    )
    kinds = workloads()
    rows = []
    native = {"max_running": 32}
    drafting = {**native, "speculation": {"method": "ngram"}}
    num_same = 0
    with (
        serve(
            {"model": MODEL, "replicas": 1, "native": {**native, "speculation": {"method": "off"}}}
        ) as plain,
        serve({"model": MODEL, "replicas": 1, "native": drafting}) as speculating,
    ):
        for name, work in kinds.items():
            num_same += same_answers(plain, speculating, work)
            for concurrency in NUM_REQUESTS:
                figures = measure(plain, speculating, work, concurrency, 1 if is_quick else NUM_ROUNDS)
                rows.append(_row(name, concurrency, figures))
                least = AIMS.get((name, concurrency), LEAST_ON_CHAT)
                ratio = figures["ratio"]
                report.aims.append(
                    Aim(f"{name}, {concurrency} at a time", f"≥ {least:g}x", f"{ratio:.2f}x", ratio >= least)
                )
                report.data[f"{name} {concurrency}"] = figures
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
) -> dict[str, Any]:
    """Load both in turns; return tokens per second of each, their ratio, and what became of the drafts."""
    spec = LoadSpec(concurrency=concurrency, max_requests=NUM_REQUESTS[concurrency], timeout_s=600)
    rates: dict[bool, list[float]] = {False: [], True: []}
    before = _drafts(speculating)
    num_tokens = 0
    for number in range(num_rounds):
        # Other texts each round where one round does not have all.
        first = number * NUM_REQUESTS[concurrency] % NUM_TEXTS
        turned = replace(work, prompts=work.prompts[first:] + work.prompts[:first])
        for is_speculating in (number % 2 == 1, number % 2 == 0):
            system = speculating if is_speculating else plain
            run = load(system.front_urls[0], turned, spec)
            rates[is_speculating].append(tokens_per_s(run))
            num_tokens += is_speculating * evaluate_valid(run).output_tokens
    num_drafts, num_accepted = (now - then for now, then in zip(_drafts(speculating), before, strict=True))
    return {
        "without": median(rates[False]),
        "with": median(rates[True]),
        "ratio": median(b / a for a, b in zip(rates[False], rates[True], strict=True)),
        "drafts_per_token": num_drafts / num_tokens,
        "acceptance": num_accepted / max(num_drafts, 1),
        "rounds": {"without": rates[False], "with": rates[True]},
    }


def tokens_per_s(run: LoadRun) -> float:
    """Return the output tokens per second until the last request is sent, or ends if there is one at a time.

    A request's tokens count by the part of its chunks that came until then: chunks carry several.
    """
    begin_s = min(record.sent_s for record in run.records)
    end_s = max(record.end_s if run.spec.concurrency == 1 else record.sent_s for record in run.records)
    num_tokens = 0.0
    for record in run.records:
        num_in_time = sum(time_s <= end_s for time_s in record.token_times)
        num_tokens += record.num_output_tokens * num_in_time / max(1, len(record.token_times))
    return num_tokens / (end_s - begin_s)


def same_answers(plain: System, speculating: System, work: Texts) -> int:
    """Return how many prompts get the same answer from both, all asked at once."""
    path = "chat/completions" if work.route == "chat" else "completions"
    bodies = []
    for index in range(len(work.prompts)):
        bodies.append({**json.loads(work.body(index)), "stream": False})
        del bodies[-1]["stream_options"]

    def ask(system: System) -> list[Any]:
        with ThreadPoolExecutor(len(bodies)) as threads:
            url = f"{system.front_urls[0]}/{path}"
            answers = threads.map(lambda body: httpx.post(url, json=body, timeout=600), bodies)
            found = [answer.raise_for_status().json() for answer in answers]
        return [(answer["choices"], answer["usage"]["completion_tokens"]) for answer in found]

    return sum(one == other for one, other in zip(ask(plain), ask(speculating), strict=True))


def _drafts(system: System) -> tuple[float, float]:
    """Return the drafts and the accepted ones since the engine's start."""
    text = httpx.get(system.front_urls[0].removesuffix("/v1") + "/metrics", timeout=30).text
    names = ("draft", "accepted")
    found = [
        re.search(rf"^headrace_spec_decode_num_{name}_tokens_total\S* (\S+)$", text, re.M) for name in names
    ]
    num_drafts, num_accepted = (0.0 if match is None else float(match[1]) for match in found)
    return num_drafts, num_accepted


def _row(name: str, concurrency: int, figures: dict[str, Any]) -> list[str]:
    return [
        name,
        str(concurrency),
        f"{figures['without']:.1f}",
        f"{figures['with']:.1f}",
        f"**{figures['ratio']:.2f}**",
        f"{figures['drafts_per_token']:.2f}",
        f"{figures['acceptance']:.0%}",
    ]
