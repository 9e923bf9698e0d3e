"""Speculation changes no answer: batched, chunked, preempted, shared, aborted, each request gives the tokens
that it gives alone and without guesses, whether the guesses are right, wrong or mixed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.engine.speculation.scripted_proposer import ConstantProposer, ScriptedProposer
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
from tests.unit.engine.tiny_models import VOCAB_SIZE as TINY_VOCAB_SIZE
from tests.unit.engine.tiny_models import huggingface_directory

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams, StepOutput
from headrace.clock import VirtualClock
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.naive import NaiveModel
from headrace.engine.native import NativeEngine
from headrace.engine.operations.kernels import KernelsMissing, load_kernels
from headrace.engine.protocol import ModelRunner
from headrace.engine.runner import load_runner
from headrace.engine.speculation.ngram import NgramProposer
from headrace.engine.speculation.proposer import Proposer
from headrace.engine.speculation.speculator import Speculator


def make_engine(
    runner: ModelRunner,
    proposer: Proposer | None,
    max_draft_tokens: int = 5,
    max_running: int = 8,
    token_budget: int = 64,
) -> NativeEngine:
    spec = EngineSpec(
        "native", "fake", max_running=max_running, token_budget=token_budget, block_size=runner.block_size
    )
    speculator = None if proposer is None else Speculator(proposer, max_draft_tokens)
    return NativeEngine(spec, runner, VirtualClock(), speculator)


def whole_answer(request: GenerationRequest, max_context_tokens: int) -> list[int]:
    """All its tokens, those of `resume_from` and a stop token included: what a perfect guess would be."""
    tokens, ending = generate_alone(request, max_context_tokens)
    stops = [0] if ending == "stop" else []
    return [*request.resume_from, *tokens, *stops]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(
    arrivals=workloads(),
    num_blocks=st.sampled_from([4, 7, 10, 16, 64]),
    token_budget=st.sampled_from([3, 8, 20, 64]),
    max_running=st.sampled_from([1, 2, 4, 8]),
    error_rate=st.sampled_from([0.0, 0.2, 0.7]),
    max_draft_tokens=st.sampled_from([1, 3, 12]),
)
@pytest.mark.slow
def test_any_workload_with_guesses_gives_what_each_request_gives_alone(
    arrivals: list[Arrival],
    num_blocks: int,
    token_budget: int,
    max_running: int,
    error_rate: float,
    max_draft_tokens: int,
) -> None:
    max_context_tokens = num_blocks * BLOCK_SIZE
    fitting = [
        arrival.request
        for arrival in arrivals
        if len(arrival.request.prompt_token_ids) + len(arrival.request.resume_from) < max_context_tokens
    ]
    answers = {request.request_id: whole_answer(request, max_context_tokens) for request in fitting}
    proposer = ScriptedProposer(answers, error_rate, VOCAB_SIZE, seed=1)
    runner = FakeRunner(num_blocks, BLOCK_SIZE, VOCAB_SIZE)
    engine = make_engine(runner, proposer, max_draft_tokens, max_running, token_budget)
    outcomes, _, aborted = drive(engine, arrivals)
    for request in fitting:
        expected, ending = generate_alone(request, max_context_tokens)
        outcome = outcomes[request.request_id]
        if request.request_id in aborted:
            assert outcome.token_ids == expected[: len(outcome.token_ids)]
            assert outcome.endings == []
        else:
            assert outcome.token_ids == expected
            assert outcome.endings == [ending]
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.num_free_blocks) == (0, 0, num_blocks)
    assert 0 <= load.num_accepted_tokens <= load.num_draft_tokens


def test_right_guesses_save_steps_and_are_counted() -> None:
    request = greedy("r", [1, 2, 3], 24)
    proposer = ScriptedProposer({"r": whole_answer(request, 4096)}, 0.0, VOCAB_SIZE, seed=1)
    engine = make_engine(FakeRunner(32), proposer, max_draft_tokens=5)
    assert run_to_end(engine, request)["r"].token_ids == generate_alone(request, 4096)[0]
    load = engine.load()
    assert load.steps < 24 / 3
    assert load.num_accepted_tokens == load.num_draft_tokens == 24 - load.steps


def test_the_workloads_above_do_preempt_with_guesses_on_board() -> None:
    requests = [greedy(f"r{i}", [i + 1] * 12, 30) for i in range(6)]
    answers = {request.request_id: whole_answer(request, 64) for request in requests}
    engine = make_engine(FakeRunner(8), ScriptedProposer(answers, 0.3, VOCAB_SIZE, seed=5), token_budget=24)
    outcomes = run_to_end(engine, *requests)
    for request in requests:
        assert outcomes[request.request_id].token_ids == answers[request.request_id]
    load = engine.load()
    assert load.num_preemptions > 0
    assert 0 < load.num_accepted_tokens < load.num_draft_tokens


def collect(engine: NativeEngine, request: GenerationRequest) -> list[StepOutput]:
    engine.submit(request)
    outputs: list[StepOutput] = []
    while engine.has_work():
        outputs += engine.step().outputs
        engine.check_integrity()
    return outputs


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_come_with_each_token_and_are_the_same(temperature: float) -> None:
    sampling = SamplingParams(
        max_tokens=30,
        temperature=temperature,
        seed=3,
        num_logprobs=2,
        ignore_eos=True,
        repetition_penalty=1.2,
    )
    request = GenerationRequest("r", [5, 6, 7], sampling)
    plain = collect(make_engine(FakeRunner(32), None), request)
    answers = {"r": [token for output in plain for token in output.token_ids]}
    guessed = collect(
        make_engine(FakeRunner(32), ScriptedProposer(answers, 0.1, VOCAB_SIZE, seed=2)), request
    )
    assert len(guessed) < len(plain)
    assert all(len(output.logprobs or []) == len(output.token_ids) for output in guessed)

    assert tokens_with_logprobs(guessed) == tokens_with_logprobs(plain)


def tokens_with_logprobs(outputs: list[StepOutput]) -> list[object]:
    return [pair for output in outputs for pair in zip(output.token_ids, output.logprobs or [], strict=True)]


def test_a_stop_token_among_right_guesses_ends_the_answer_before_the_rest() -> None:
    free, _ = generate_alone(greedy("r", [5, 6, 7], 12), 4096)
    stop = free[4]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    engine = make_engine(FakeRunner(8), ScriptedProposer({"r": free}, 0.0, VOCAB_SIZE, seed=1), 10)
    outcome = run_to_end(engine, GenerationRequest("r", [5, 6, 7], sampling))["r"]
    assert outcome.token_ids == free[: free.index(stop)]
    assert outcome.endings == ["stop"]
    assert engine.load().num_free_blocks == 8


def test_the_next_turn_finds_guessed_tokens_cached_and_never_a_wrong_guess() -> None:
    """The fake runner reads the tokens that lie in the blocks: a cached wrong guess would change it."""
    prompt = list(range(1, 13))
    request = greedy("turn 1", prompt, 21)
    answer = whole_answer(request, 4096)
    runner = FakeRunner(32)
    engine = make_engine(runner, ScriptedProposer({"turn 1": answer, "turn 2": []}, 0.4, VOCAB_SIZE, seed=4))
    assert run_to_end(engine, request)["turn 1"].token_ids == answer
    second = greedy("turn 2", [*prompt, *answer, 50, 51], 3)
    outcome = run_to_end(engine, second)["turn 2"]
    assert outcome.cached[0] == 32
    assert outcome.token_ids == generate_alone(second, 4096)[0]


def test_logits_that_are_not_finite_behind_a_right_guess_end_the_request_one_step_later() -> None:
    request = greedy("r", [1, 2, 3], 12)
    answer = whole_answer(request, 4096)
    poison = next(token for index, token in enumerate(answer) if index >= 3 and token not in answer[:index])
    runner = FakeRunner(32)
    runner.poison_token = poison
    engine = make_engine(runner, ScriptedProposer({"r": answer}, 0.0, VOCAB_SIZE, seed=1), 8)
    outputs = collect(engine, request)
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == answer[: answer.index(poison) + 1], "as without guesses"
    assert [output.finish_reason for output in outputs][-1] == "error"
    assert engine.load().num_free_blocks == 32


# ---- distribution ----------------

NUM_SEEDS = 1500


@pytest.mark.slow
def test_sampled_tokens_have_the_same_distribution_with_and_without_guesses() -> None:
    """Two-sample chi-square over the first three tokens, other seeds on either side, so that equality by seed
    cannot help. One token is guessed throughout: being guessed must not make it likelier."""
    second = Counter(tokens[1] for tokens in beginnings(None, range(500))[0])
    guess = second.most_common(1)[0][0]
    plain = Counter(beginnings(None, range(1000, 1000 + NUM_SEEDS))[0])
    guessed_tokens, num_accepted = beginnings(guess, range(10_000, 10_000 + NUM_SEEDS))
    guessed = Counter(guessed_tokens)
    assert num_accepted > NUM_SEEDS / 20
    cells = [cell for cell in plain | guessed if plain[cell] + guessed[cell] >= 20]
    statistic = sum((plain[cell] - guessed[cell]) ** 2 / (plain[cell] + guessed[cell]) for cell in cells)
    degrees = len(cells)
    assert degrees > 30
    # Wilson and Hilferty's approximation (PNAS 17, 1931) of chi-square's 99.9% quantile.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {degrees} cells, at most {limit:.1f}"


def beginnings(guess: int | None, seeds: range) -> tuple[list[tuple[int, ...]], int]:
    """One prompt's first three tokens for each seed, with `guess` as every guess; and how many were right."""
    proposer = None if guess is None else ConstantProposer(guess)
    engine = make_engine(FakeRunner(256), proposer, 3, max_running=64, token_budget=512)
    requests = [
        GenerationRequest(
            str(seed),
            [9, 8, 7, 6],
            SamplingParams(max_tokens=5, temperature=0.6, top_k=4, ignore_eos=True, seed=seed),
        )
        for seed in seeds
    ]
    outcomes = run_to_end(engine, *requests)
    return [tuple(outcome.token_ids[:3]) for outcome in outcomes.values()], engine.load().num_accepted_tokens


# ---- real arithmetic ----------------


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_tokens_of_real_models_are_those_of_the_naive_model(tmp_path: Path, architecture: str) -> None:
    files = huggingface_directory(tmp_path, architecture)
    naive = NaiveModel(files)
    spec = EngineSpec("native", "tiny", block_size=8, num_threads=1, dtype="float32", kv_cache_bytes=1 << 20)
    runner = load_runner(spec, files, lambda _phase: None)
    prompts = {"a": [5, 6, 7, 8] * 4, "b": list(range(20, 50)), "c": [3, 3, 9] * 5}
    expected = {name: naive.generate(prompt, 24) for name, prompt in prompts.items()}
    proposers: list[Proposer] = [ScriptedProposer(expected, 0.2, TINY_VOCAB_SIZE, seed=6), NgramProposer()]
    for proposer in proposers:
        engine = make_engine(runner, proposer)
        requests = [greedy(name, prompt, 24) for name, prompt in prompts.items()]
        outcomes = run_to_end(engine, *requests)
        assert {name: outcomes[name].token_ids for name in prompts} == expected, proposer.description
        assert engine.load().num_draft_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_in_int8_tokens_and_logprobs_are_the_same_bits(tmp_path: Path, temperature: float) -> None:
    try:
        load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    files = huggingface_directory(tmp_path)
    spec = EngineSpec("native", "tiny", block_size=8, num_threads=1, dtype="int8", kv_cache_bytes=1 << 20)
    runner = load_runner(spec, files, lambda _phase: None)
    # Few words, so that they come again and n-grams find them.
    bias = {40: 8.0, 41: 8.0, 42: 8.0}
    requests = [
        GenerationRequest(
            f"r{seed}",
            [5, 6, 7, 8] * 3 + [seed],
            SamplingParams(
                max_tokens=40,
                temperature=temperature,
                seed=seed,
                num_logprobs=2,
                ignore_eos=True,
                logit_bias=bias,
            ),
        )
        for seed in range(4)
    ]
    plain = {request.request_id: collect(make_engine(runner, None), request) for request in requests}
    engine = make_engine(runner, NgramProposer())
    for request in requests:
        engine.submit(request)
    guessed: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        for output in engine.step().outputs:
            guessed[output.request_id].append(output)
    assert engine.load().num_accepted_tokens > 0
    for name in plain:
        assert tokens_with_logprobs(guessed[name]) == tokens_with_logprobs(plain[name])
