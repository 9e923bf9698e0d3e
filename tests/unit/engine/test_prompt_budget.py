"""How much of prompts a step computes beside running streams: the rule, and what requests wait by it."""

from __future__ import annotations

import random
import sys
from statistics import mean

import pytest
from tests.unit.engine.prompt_budget_rig import MAX_RUNNING, MODEL, TOKEN_BUDGET, Answer, Arrival, play

from headrace.engine.prompt_budget import (
    LEAST_TOKENS,
    RESUMED_WEIGHT,
    STREAMS_PER_PROMPT,
    Streams,
    prompt_budget,
)


def by_rule(streams: Streams) -> int:
    return prompt_budget(MODEL, streams, TOKEN_BUDGET)


def prompts_first(streams: Streams) -> int:
    return sys.maxsize


def alone_s(streams: Streams) -> float:
    a, _, _, c, d = MODEL
    return a + c * streams.num_decoding + d * streams.num_kv_tokens


def more_s(streams: Streams, num_tokens: int) -> float:
    """By how much so many prompt tokens lengthen a step."""
    _, b, q, _, _ = MODEL
    return b * num_tokens + q * num_tokens * (streams.num_before + (num_tokens + 1) / 2)


def weight(streams: Streams) -> int:
    """Prompts that wait; who waited before counts as several."""
    return streams.num_prompts + (RESUMED_WEIGHT - 1) * streams.num_resumed


def cost(streams: Streams, lateness_s: float) -> float:
    """What a step of that lateness costs all who wait, per second of prompts' work."""
    step_s, num_decoding = alone_s(streams), streams.num_decoding
    waiting = weight(streams) * step_s / lateness_s
    return waiting + num_decoding * lateness_s / (STREAMS_PER_PROMPT * step_s)


SITUATIONS = [
    Streams(8, 8 * 200, 1, 0),
    Streams(8, 8 * 200, 1, 1_700),
    Streams(1, 130, 31, 0),
    Streams(16, 16 * 150, 16, 64),
    Streams(31, 31 * 200, 1, 0),
    Streams(2, 16_000, 4, 8_000),
    Streams(8, 8 * 200, 1, 0, 1),
    Streams(8, 8 * 200, 12, 0, 8),
]


@pytest.mark.parametrize("streams", SITUATIONS, ids=str)
def test_no_other_number_of_tokens_costs_those_who_wait_less(streams: Streams) -> None:
    chosen = by_rule(streams)
    assert LEAST_TOKENS < chosen < TOKEN_BUDGET
    least = min(cost(streams, more_s(streams, number)) for number in range(1, TOKEN_BUDGET))
    # One token more or less is what rounding may miss it by.
    assert cost(streams, more_s(streams, chosen)) <= least * 1.01


@pytest.mark.parametrize("streams", SITUATIONS, ids=str)
def test_a_stream_waits_no_longer_than_is_said(streams: Streams) -> None:
    lateness = more_s(streams, by_rule(streams)) / alone_s(streams)
    assert lateness <= (STREAMS_PER_PROMPT * weight(streams) / streams.num_decoding) ** 0.5 * 1.001
    assert lateness <= (STREAMS_PER_PROMPT * RESUMED_WEIGHT * (MAX_RUNNING - 1)) ** 0.5


def test_one_prompt_beside_eight_streams_gets_little_and_a_burst_beside_one_stream_much() -> None:
    assert more_s(SITUATIONS[0], by_rule(SITUATIONS[0])) <= 0.9 * alone_s(SITUATIONS[0])
    assert by_rule(Streams(1, 130, 31, 0)) > 5 * by_rule(Streams(8, 8 * 130, 1, 0))


def test_without_streams_or_measurements_a_prompt_gets_the_whole_step() -> None:
    assert by_rule(Streams(0, 0, 1, 0)) == TOKEN_BUDGET
    assert prompt_budget((0.0,) * 5, Streams(8, 800, 1, 0), TOKEN_BUDGET) == TOKEN_BUDGET


def test_a_prompt_goes_on_however_dear_its_tokens_are_and_within_the_budget() -> None:
    dear = (0.001, 1.0, 0.0, 0.0, 0.0)
    assert prompt_budget(dear, Streams(8, 800, 1, 0), TOKEN_BUDGET) == LEAST_TOKENS
    assert prompt_budget(dear, Streams(8, 800, 1, 0), 2) == 2
    assert prompt_budget((1.0, 1e-9, 0.0, 0.0, 0.0), Streams(8, 800, 1, 0), TOKEN_BUDGET) == TOKEN_BUDGET


# ---- what requests wait: the real scheduler, in the step model's time


def tokens_per_s(answers: list[Answer]) -> float:
    return sum(len(answer.token_times_s) for answer in answers) / max(
        answer.token_times_s[-1] for answer in answers
    )


def longest_gap_s(answers: list[Answer]) -> float:
    return max(gap_s for answer in answers for gap_s in answer.gaps_s())


@pytest.mark.parametrize("size", [16, 32])
def test_a_burst_keeps_its_throughput_while_gaps_stay_short(size: int) -> None:
    burst = [Arrival(0.0, 128, 128)] * size
    ruled, free = play(burst, by_rule), play(burst, prompts_first)
    assert tokens_per_s(ruled) > 0.93 * tokens_per_s(free)
    assert mean(answer.ttft_s for answer in ruled) < 1.15 * mean(answer.ttft_s for answer in free)
    assert mean(answer.latency_s for answer in ruled) < 1.01 * mean(answer.latency_s for answer in free)
    assert longest_gap_s(ruled) < longest_gap_s(free) / 3


def test_a_long_prompt_makes_no_gap_of_eight_streams_twice_as_long() -> None:
    arrivals = [Arrival(0.0, 64, 400)] * 8 + [Arrival(1.5, 2_000, 1)]
    *streams, prompt = play(arrivals, by_rule)
    before = max(gap_s for answer in streams for gap_s in answer.gaps_s(1.0, 1.4))
    during = max(gap_s for answer in streams for gap_s in answer.gaps_s(1.5, prompt.token_times_s[0]))
    assert during < 2 * before
    [alone] = play([Arrival(0.0, 2_000, 1)], by_rule)
    assert prompt.ttft_s < 2.5 * alone.ttft_s, "the prompt gets nearly half of the engine's time"


def test_a_stream_that_lost_its_engine_is_caught_up_sooner_than_a_new_one_begins() -> None:
    streams = [Arrival(0.0, 64, 400)] * 8
    [alone] = play([Arrival(0.0, 500, 1)], by_rule)
    *_, new = play([*streams, Arrival(1.5, 500, 1)], by_rule)
    *others, resumed = play([*streams, Arrival(1.5, 500, 1, is_resumed=True)], by_rule)
    assert resumed.ttft_s < 0.8 * new.ttft_s
    assert resumed.ttft_s < 1.75 * alone.ttft_s
    before = max(gap_s for answer in others for gap_s in answer.gaps_s(1.0, 1.4))
    assert max(gap_s for answer in others for gap_s in answer.gaps_s(1.5)) < 3 * before


def test_resumed_streams_go_before_new_prompts_of_a_burst() -> None:
    new = [Arrival(0.0, 300, 10)] * 8
    *_, last = play([*new, Arrival(0.01, 300, 10)], by_rule)
    *_, resumed = play([*new, Arrival(0.01, 300, 10, is_resumed=True)], by_rule)
    assert resumed.ttft_s < 0.5 * last.ttft_s


@pytest.mark.parametrize("rate_per_s", [2.0, 4.0])
def test_of_poisson_arrivals_none_waits_much_longer_and_gaps_are_far_shorter(rate_per_s: float) -> None:
    source = random.Random(3)
    arrivals, now_s = [], 0.0
    while now_s < 60:
        now_s += source.expovariate(rate_per_s)
        num_prompt = min(2_000, 8 + int(source.lognormvariate(5, 1)))
        arrivals.append(Arrival(now_s, num_prompt, 2 + int(source.expovariate(1 / 120))))
    ruled, free = play(arrivals, by_rule), play(arrivals, prompts_first)
    assert mean(answer.latency_s for answer in ruled) < 1.12 * mean(answer.latency_s for answer in free)
    assert longest_gap_s(ruled) < longest_gap_s(free) / 5
