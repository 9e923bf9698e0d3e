"""Plays arrivals through the real scheduler, in the time that a step model says: what requests wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.prompt_budget import Coefficients, Streams
from headrace.engine.request import EngineRequest
from headrace.engine.scheduler import Decision, Scheduler

MODEL: Coefficients = (5e-3, 0.33e-3, 0.3e-6, 0.38e-3, 0.4e-6)
"""Measured: SmolLM2-135M in int8 on two cores."""
MAX_RUNNING, TOKEN_BUDGET, BLOCK_SIZE = 32, 512, 16

Rule = Callable[[Streams], int]


class Arrival(NamedTuple):
    """A request: when it comes, and how long prompt and answer are."""

    at_s: float
    num_prompt: int
    num_output: int
    is_resumed: bool = False
    """It was a stream in another engine."""


class Answer(NamedTuple):
    """When a request came, and when each of its tokens."""

    at_s: float
    token_times_s: list[float]

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.at_s

    @property
    def latency_s(self) -> float:
        return self.token_times_s[-1] - self.at_s

    def gaps_s(self, begin_s: float = 0.0, end_s: float = float("inf")) -> list[float]:
        """Return its gaps that overlap [begin_s, end_s)."""
        pairs = pairwise(self.token_times_s)
        return [after - before for before, after in pairs if after > begin_s and before < end_s]


def play(arrivals: Sequence[Arrival], rule: Rule) -> list[Answer]:
    """Return each arrival's answer. Arrivals are in order of time."""
    scheduler = Scheduler(BlockPool(8192), BLOCK_SIZE, MAX_RUNNING, TOKEN_BUDGET)
    answers = [Answer(arrival.at_s, []) for arrival in arrivals]
    now_s = 0.0
    index = 0
    while index < len(arrivals) or scheduler.running or scheduler.waiting:
        if not scheduler.running and not scheduler.waiting:
            now_s = max(now_s, arrivals[index].at_s)
        while index < len(arrivals) and arrivals[index].at_s <= now_s:
            scheduler.add(_request(index, arrivals[index]))
            index += 1
        decision = scheduler.schedule(rule)
        now_s += step_s(decision)
        scheduler.update(decision)
        for item in decision.scheduled:
            if item.is_sampled:
                answers[item.request.arrival].token_times_s.append(now_s)
                if item.request.append(1):
                    scheduler.remove(item.request.request_id)
    return answers


def step_s(decision: Decision) -> float:
    """Return how long the step takes by MODEL."""
    a, b, q, c, d = MODEL
    seconds = a
    for item in decision.scheduled:
        num_new, num_before = item.num_new_tokens, item.request.num_computed_tokens
        if item.is_decoding:
            seconds += c + d * (num_before + 1)
        else:
            seconds += b * num_new + q * (num_new * num_before + num_new * (num_new + 1) / 2)
    return seconds


def _request(index: int, arrival: Arrival) -> EngineRequest:
    sampling = SamplingParams(max_tokens=arrival.num_output, ignore_eos=True)
    prompt = [index + 1] * arrival.num_prompt  # none shares another's prefix
    stream_class = "A" if arrival.is_resumed else ""
    request = GenerationRequest(str(index), prompt, sampling, stream_class=stream_class)
    return EngineRequest(request, index, frozenset(), 1 << 16)
