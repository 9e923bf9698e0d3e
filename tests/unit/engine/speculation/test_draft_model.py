"""A small model that guesses, with fake runners: what it computes, what it shares, and that it is right.

A draft runner whose logits are the large one's guesses everything right exactly as long as every slot of its
own KV memory holds what it should: acceptance 1 is the oracle.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
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
from tests.unit.engine.tiny_models import gguf_file

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import VirtualClock
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.naive import NaiveModel
from headrace.engine.native import NativeEngine
from headrace.engine.runner import load_runner
from headrace.engine.speculation.draft_model import DraftModelProposer
from headrace.engine.speculation.select import check_same_vocabulary, load_speculator
from headrace.errors import ConfigError, OutOfMemory, Overloaded


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
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


def test_asleep_the_draft_model_gives_its_memory_back_and_forgets_what_it_held() -> None:
    engine, draft_runner = make_pair(32)
    request = greedy("r", list(range(1, 34)), 12)
    expected = generate_alone(request, 4096)[0]
    assert run_to_end(engine, request)["r"].token_ids == expected
    engine.sleep(1)
    assert draft_runner.sleep_level == 1
    engine.wake()
    assert run_to_end(engine, request)["r"].token_ids == expected
    load = engine.load()
    assert load.num_accepted_tokens == load.num_draft_tokens


def test_an_engine_whose_draft_model_cannot_wake_sleeps_on() -> None:
    engine, draft_runner = make_pair(32)
    engine.sleep(1)
    draft_runner.wake_error = OutOfMemory("no memory")
    with pytest.raises(OutOfMemory):
        engine.wake()
    assert engine.load().sleep_level == 1
    with pytest.raises(Overloaded, match="asleep"):
        engine.submit(greedy("r", [1, 2], 3))
    engine.wake()
    assert len(run_to_end(engine, greedy("r", [1, 2], 3))["r"].token_ids) == 3


def test_past_the_draft_models_context_nothing_is_guessed() -> None:
    engine, draft_runner = make_pair(64)
    draft_runner.max_context_tokens = 40
    request = greedy("r", [1, 2, 3, 4], 80)
    assert run_to_end(engine, request)["r"].token_ids == generate_alone(request, 4096)[0]
    assert 20 < engine.load().num_accepted_tokens < 40


# ---- real models ----------------


def tiny_spec(**changes: Any) -> EngineSpec:
    spec = EngineSpec("native", "tiny", block_size=8, num_threads=1, dtype="float32", max_running=2)
    return msgspec.structs.replace(spec, **changes)


@pytest.mark.slow
def test_a_model_that_guesses_for_itself_is_right_and_another_one_changes_no_token(tmp_path: Path) -> None:
    files = gguf_file(tmp_path / "large.gguf")
    gguf_file(tmp_path / "small.gguf", num_hidden_layers=1)
    prompts = {"a": [5, 6, 7, 8] * 3, "b": list(range(20, 32))}
    naive = NaiveModel(files)
    expected = {name: naive.generate(prompt, 12) for name, prompt in prompts.items()}
    acceptances = []
    for draft in ("large", "small"):
        spec = tiny_spec(speculation="draft", draft_model=str(tmp_path / f"{draft}.gguf"), max_draft_tokens=4)
        runner = load_runner(spec, files, lambda _phase: None)
        speculator = load_speculator(spec, files, runner, lambda _phase: None)
        engine = NativeEngine(spec, runner, VirtualClock(), speculator)
        outcomes = run_to_end(engine, *[greedy(name, prompt, 12) for name, prompt in prompts.items()])
        assert {name: outcomes[name].token_ids for name in prompts} == expected
        load = engine.load()
        acceptances.append(load.num_accepted_tokens / load.num_draft_tokens)
    assert acceptances[0] == 1.0
    assert acceptances[1] < 0.9


def test_a_draft_model_with_another_vocabulary_is_refused_with_the_difference(tmp_path: Path) -> None:
    metadata = read_metadata(gguf_file(tmp_path / "large.gguf"))
    check_same_vocabulary(metadata, metadata)
    larger = replace(metadata, name="b", hyperparameters=replace(metadata.hyperparameters, vocab_size=128))
    with pytest.raises(ConfigError, match="draft_model b has 128 tokens and large has 96"):
        check_same_vocabulary(metadata, larger)
    assert metadata.gguf_tokenizer is not None
    tokens = [*metadata.gguf_tokenizer.tokens[:9], "else", *metadata.gguf_tokenizer.tokens[10:]]
    other = replace(metadata, name="b", gguf_tokenizer=replace(metadata.gguf_tokenizer, tokens=tokens))
    with pytest.raises(ConfigError, match="token 9 is b'else' to draft_model b and b'word6' to large"):
        check_same_vocabulary(metadata, other)


def test_speculation_is_off_or_what_the_spec_names(tmp_path: Path) -> None:
    runner = FakeRunner(8)
    files = ModelFiles("any", "gguf", tmp_path)
    assert load_speculator(tiny_spec(), files, runner, print) is None
    speculator = load_speculator(tiny_spec(speculation="ngram", max_draft_tokens=5), files, runner, print)
    assert speculator is not None
    assert speculator.description == "n-grams, at most 5 tokens"
