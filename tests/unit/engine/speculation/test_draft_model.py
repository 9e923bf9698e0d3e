"""A small model that guesses, with fake runners: what it computes, what it shares, and that it is right.

A draft runner whose logits are the large one's guesses everything right exactly as long as every slot of its
own KV memory holds what it should: acceptance 1 is the oracle.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.engine.speculation.test_same_answers import make_engine
from tests.unit.engine.test_native import (
    BLOCK_SIZE,
    VOCAB_SIZE,
    Arrival,
    drive,
    generate_alone,
    greedy,
    run_to_end,
    workloads,
)

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.native import NativeEngine
from headrace.engine.speculation.draft_model import DraftModelProposer


def make_pair(
    num_blocks: int, max_draft_tokens: int = 4, max_running: int = 8, token_budget: int = 64
) -> tuple[NativeEngine, FakeRunner]:
    """An engine whose draft model has the large model's logits."""
    draft_runner = FakeRunner(num_blocks, BLOCK_SIZE, VOCAB_SIZE)
    engine = make_engine(
        FakeRunner(num_blocks, BLOCK_SIZE, VOCAB_SIZE),
        DraftModelProposer(draft_runner, token_budget),
        max_draft_tokens,
        max_running,
        token_budget,
    )
    return engine, draft_runner


def as_greedy(arrivals: list[Arrival]) -> list[Arrival]:
    """The same workload without anything that changes logits."""
    return [
        Arrival(
            GenerationRequest(
                arrival.request.request_id,
                arrival.request.prompt_token_ids,
                SamplingParams(
                    max_tokens=arrival.request.sampling.max_tokens, temperature=0.0, ignore_eos=True
                ),
                arrival.request.resume_from,
                priority=arrival.request.priority,
                cache_salt=arrival.request.cache_salt,
            ),
            arrival.at_step,
            arrival.abort_after,
        )
        for arrival in arrivals
    ]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(
    arrivals=workloads(),
    num_blocks=st.sampled_from([4, 7, 10, 16, 64]),
    token_budget=st.sampled_from([3, 8, 20, 64]),
    max_running=st.sampled_from([1, 2, 4, 8]),
    max_draft_tokens=st.sampled_from([1, 3, 12]),
    is_greedy=st.booleans(),
)
@pytest.mark.slow
def test_any_workload_gives_the_same_answers_and_a_perfect_draft_model_is_always_right(
    arrivals: list[Arrival],
    num_blocks: int,
    token_budget: int,
    max_running: int,
    max_draft_tokens: int,
    is_greedy: bool,
) -> None:
    if is_greedy:
        arrivals = as_greedy(arrivals)
    engine, _ = make_pair(num_blocks, max_draft_tokens, max_running, token_budget)
    outcomes, refused, aborted = drive(engine, arrivals)
    for arrival in arrivals:
        request = arrival.request
        if request.request_id in refused:
            continue
        expected, ending = generate_alone(request, num_blocks * BLOCK_SIZE)
        outcome = outcomes[request.request_id]
        if request.request_id in aborted:
            assert outcome.token_ids == expected[: len(outcome.token_ids)]
        else:
            assert (outcome.token_ids, outcome.endings) == (expected, [ending])
    load = engine.load()
    if is_greedy:
        assert load.num_accepted_tokens == load.num_draft_tokens


def test_each_guess_costs_one_small_pass_and_each_token_is_computed_once() -> None:
    engine, draft_runner = make_pair(32, max_draft_tokens=4)
    request = greedy("r", [1, 2, 3, 4, 5, 6], 26)
    assert run_to_end(engine, request)["r"].token_ids == generate_alone(request, 4096)[0]
    load = engine.load()
    assert load.steps == 1 + 5, "a prompt, then five tokens a step"
    # The last step's last token, and the guess before it, are never needed.
    assert draft_runner.num_computed_tokens == 6 + 26 - 2


def test_a_prompt_cached_by_one_request_is_not_computed_again_for_the_next() -> None:
    engine, draft_runner = make_pair(32)
    prompt = list(range(1, 34))
    run_to_end(engine, greedy("first", prompt, 6))
    before = draft_runner.num_computed_tokens
    second = greedy("second", prompt, 6)
    assert run_to_end(engine, second)["second"].token_ids == generate_alone(second, 4096)[0]
    # One prompt token is missing, so that its first step guesses already: that token and three guesses.
    assert draft_runner.num_computed_tokens - before == 4


def test_two_requests_that_share_what_the_small_model_has_not_seen_do_not_fill_a_block_twice() -> None:
    """The fake runner asserts that no slot is written twice in a pass."""
    engine, _ = make_pair(64)
    prompt = list(range(1, 34))
    run_to_end(engine, greedy("first", prompt, 1))
    pair = [greedy(name, prompt, 12) for name in ("second", "third")]
    outcomes = run_to_end(engine, *pair)
    for request in pair:
        assert outcomes[request.request_id].token_ids == generate_alone(request, 4096)[0]
    load = engine.load()
    assert load.num_accepted_tokens == load.num_draft_tokens > 0


def test_a_long_prompt_is_caught_up_with_within_the_token_budget() -> None:
    engine, _ = make_pair(64, token_budget=16)
    request = greedy("r", [t % 60 + 1 for t in range(100)], 30)
    assert run_to_end(engine, request)["r"].token_ids == generate_alone(request, 4096)[0]
    assert 0 < engine.load().num_accepted_tokens < 24, "the first steps guess nothing"
