"""What is sent and when: request bodies and arrival times, all from one seed. Pure.

Owns prompts, lengths and arrivals. Must not know sockets or the time of day.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from headrace.errors import HeadraceError

Route = Literal["chat", "completions"]
ROUTE_PATHS: dict[Route, str] = {"chat": "/chat/completions", "completions": "/completions"}

# Short, frequent English words: nearly every tokenizer has each of them, with the space before it, as one
# token, so that a prompt of N words has about N tokens.
_TEXT = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home
water room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city community name president
team minute idea body information back parent face others level office door health person art war history
party result change morning reason research girl guy moment air teacher force education foot boy age
policy music market sense nation plan college interest death experience effect use class control field
development role effort rate heart drug show leader light voice wife police mind price report decision
son view relationship town road arm difference value building action season society tax director position
player record paper space ground form event official matter center couple site project activity star
table need court oil situation cost industry figure street image phone data picture practice piece land
product doctor wall patient worker news test movie north love support technology step baby computer type
attention film tree source hair look window culture chance brother energy period course summer hospital
bed operation black white blue green red small large young old good new first last long great little own
other big high different early important few public bad same able
"""
WORDS = tuple(_TEXT.split())


class WorkloadError(HeadraceError):
    """A length, rate or count is not usable."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: fixed, uniform (a..b), normal or exponential (mean a)."""

    kind: Literal["fixed", "uniform", "normal", "exponential"]
    a: float
    b: float = 0.0

    def sample(self, source: random.Random) -> int:
        """Draw one length, >= 1."""
        if self.kind == "uniform":
            return source.randint(int(self.a), int(self.b))
        if self.kind == "normal":
            return max(1, round(source.gauss(self.a, self.b)))
        if self.kind == "exponential":
            return max(1, round(source.expovariate(1 / self.a)))
        return int(self.a)

    def __str__(self) -> str:
        if self.kind == "uniform":
            return f"{self.a:g}-{self.b:g}"
        if self.kind == "normal":
            return f"normal:{self.a:g},{self.b:g}"
        return f"exponential:{self.a:g}" if self.kind == "exponential" else f"{self.a:g}"


def parse_lengths(text: str) -> Lengths:
    """Read `128`, `64-256`, `normal:MEAN,DEVIATION` or `exponential:MEAN`. Raises WorkloadError."""
    kind, _, rest = text.strip().rpartition(":")
    try:
        if kind == "normal":
            mean, deviation = (float(part) for part in rest.split(","))
            lengths = Lengths("normal", mean, deviation)
        elif kind == "exponential":
            lengths = Lengths("exponential", float(rest))
        elif kind == "" and "-" in rest:
            low, high = (int(part) for part in rest.split("-"))
            lengths = Lengths("uniform", low, high)
        elif kind == "":
            lengths = Lengths("fixed", int(rest))
        else:
            raise ValueError(kind)
    except ValueError:
        raise WorkloadError(
            f"{text!r} is not a length: write 128, 64-256, normal:128,32 or exponential:128"
        ) from None
    is_finite = math.isfinite(lengths.a) and math.isfinite(lengths.b)
    if not is_finite or lengths.a < 1 or lengths.b < 0 or max(lengths.a, lengths.b) > 10_000_000:
        raise WorkloadError(f"{text!r}: lengths are from 1 to 10,000,000 tokens")
    if lengths.kind == "uniform" and lengths.b < lengths.a:
        raise WorkloadError(f"{text!r}: the first length is greater than the second")
    return lengths


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run. Request i of a seed is always the same, whatever came before it."""

    model: str
    route: Route = "chat"
    input_tokens: Lengths = Lengths("fixed", 128)
    output_tokens: Lengths = Lengths("fixed", 128)
    shared_prefix_tokens: int = 0
    """Tokens at the beginning of every prompt that all of its group have in common, part of its length."""
    num_groups: int = 1
    """Groups of requests; each has a shared prefix of its own."""
    group_skew: float = 0.0
    """Group k is asked for in proportion to 1 / k^group_skew: 0: all alike; 1: Zipf's law."""
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0

    def with_seed(self, seed: int) -> Workload:
        """Return the same workload with other random choices."""
        return replace(self, seed=seed)

    def body(self, index: int) -> bytes:
        """Return the JSON body of request `index`. Warm-up requests have negative indices."""
        source = _source(self.seed, str(index))
        group = 0
        if self.num_groups > 1:
            weights = [1 / (k + 1) ** self.group_skew for k in range(self.num_groups)]
            (group,) = source.choices(range(self.num_groups), weights)
        prompt = self._prompt(self.input_tokens.sample(source), source, group)
        tree: dict[str, Any] = {"model": self.model}
        if self.route == "chat":
            tree["messages"] = [{"role": "user", "content": prompt}]
        else:
            tree["prompt"] = prompt
        tree["max_tokens"] = self.output_tokens.sample(source)
        tree["temperature"] = self.temperature
        tree["stream"] = True
        tree["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            tree["ignore_eos"] = True
        return json.dumps(tree, separators=(",", ":")).encode()

    def _prompt(self, num_tokens: int, source: random.Random, group: int) -> str:
        num_shared = min(self.shared_prefix_tokens, num_tokens)
        purpose = f"shared {group}" if group else "shared"
        shared = _source(self.seed, purpose).choices(WORDS, k=self.shared_prefix_tokens)[:num_shared]
        return " ".join(shared + source.choices(WORDS, k=num_tokens - num_shared))


Arrivals = Literal["poisson", "fixed"]


def arrival_times(rate: float, arrivals: Arrivals, seed: int) -> Iterator[float]:
    """Yield rising times in seconds from the start of the run, without end: `rate` requests per second,
    with exponential gaps (a Poisson process) or equal ones. The first is at 0."""
    source = _source(seed, "arrivals")
    now_s = 0.0
    index = 0
    while True:
        yield now_s
        index += 1
        # A multiple, not a sum: equal gaps stay equal over any number of requests.
        now_s = index / rate if arrivals == "fixed" else now_s + source.expovariate(rate)


def _source(seed: int, purpose: str) -> random.Random:
    """Random numbers for one purpose, the same for the same seed."""
    return random.Random(f"{seed}:{purpose}")  # noqa: S311, no secrets here
