"""The native engine with the fake runner against a naive loop that serves one request at a time.

The fake runner's logits are a hash of the context that lies in its KV slots, so equal tokens mean that block
tables, slots, positions, sharing, eviction and preemption were right at every step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams, StepOutput
from headrace.clock import VirtualClock
from headrace.engine.fake_runner import FakeRunner, fake_logits
from headrace.engine.native import NativeEngine
from headrace.engine.request import EngineRequest
from headrace.engine.sampler import Sampler
from headrace.errors import InvalidRequest, ModelError

EOS = frozenset({0})
BLOCK_SIZE = 8
VOCAB_SIZE = 61


def make_engine(runner: FakeRunner, max_running: int = 8, token_budget: int = 32) -> NativeEngine:
    spec = EngineSpec(
        kind="native",
        model="fake",
        max_running=max_running,
        token_budget=token_budget,
        block_size=runner.block_size,
    )
    return NativeEngine(spec, runner, VirtualClock())


def generate_alone(request: GenerationRequest, max_context_tokens: int) -> tuple[list[int], str]:
    """Generate one token after the other from the whole context: no blocks, no batch, no cache."""
    state = EngineRequest(request, 0, EOS, max_context_tokens)
    tokens: list[int] = []
    while True:
        context = [*request.prompt_token_ids, *request.resume_from, *tokens]
        logits = torch.from_numpy(fake_logits(context, VOCAB_SIZE))[None]
        token = Sampler().sample(logits, [state])[0].token_id
        stops = set(request.sampling.stop_token_ids) | (set() if request.sampling.ignore_eos else EOS)
        if token in stops:
            return tokens, "stop"
        tokens.append(token)
        state.token_ids.append(token)
        is_full = len(context) + 1 >= max_context_tokens
        if is_full or len(request.resume_from) + len(tokens) >= request.sampling.max_tokens:
            return tokens, "length"


@dataclass
class Outcome:
    """What came out for one request."""

    token_ids: list[int] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


class Outcomes(defaultdict[str, Outcome]):
    def __init__(self) -> None:
        super().__init__(Outcome)

    def take(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            outcome = self[output.request_id]
            assert not outcome.endings, f"{output.request_id} gave output after its end"
            outcome.token_ids += output.token_ids
            outcome.cached.append(output.num_cached_tokens)
            if output.finish_reason is not None:
                outcome.endings.append(output.finish_reason)


def run_to_end(engine: NativeEngine, *requests: GenerationRequest) -> Outcomes:
    for request in requests:
        engine.submit(request)
    outcomes = Outcomes()
    for _ in range(5000):
        if not engine.has_work():
            return outcomes
        outcomes.take(engine.step().outputs)
        engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


def greedy(
    request_id: str, prompt: list[int], max_tokens: int, *, ignore_eos: bool = True, cache_salt: str = ""
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
    return GenerationRequest(request_id, prompt, sampling, cache_salt=cache_salt)


# ---- random workloads ----------------

TOKENS = st.integers(0, VOCAB_SIZE - 1)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([{}, {3: 2.0, 5: -100.0}]),
    seed=st.integers(0, 2**63),
    stop_token_ids=st.sampled_from([(), (7,), (8, 9)]),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 6]),
)


@dataclass(frozen=True)
class Arrival:
    """One request of a workload: when it comes, how its prompt begins, and whether its client leaves."""

    request: GenerationRequest
    at_step: int
    abort_after: int | None


@st.composite
def workloads(draw: st.DrawFn) -> list[Arrival]:
    prefixes = draw(st.lists(st.lists(TOKENS, min_size=8, max_size=40), min_size=1, max_size=3))
    arrivals = []
    for index in range(draw(st.integers(1, 12))):
        prefix = draw(st.sampled_from([[], *prefixes]))
        sampling = draw(SAMPLING)
        resume = draw(st.one_of(st.just([]), st.lists(TOKENS, max_size=sampling.max_tokens - 1)))
        request = GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=[*prefix, *draw(st.lists(TOKENS, min_size=0 if prefix else 1, max_size=20))],
            sampling=sampling,
            resume_from=resume,
            priority=draw(st.sampled_from([0, 0, 0, 1])),
            cache_salt=draw(st.sampled_from(["", "", "acme"])),
        )
        abort_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 20)))
        arrivals.append(Arrival(request, draw(st.integers(0, 25)), abort_after))
    return arrivals


def drive(engine: NativeEngine, arrivals: list[Arrival]) -> tuple[Outcomes, set[str], set[str]]:
    """Run a workload step by step, checking after each; return what came out, the refused and the aborted."""
    outcomes, refused, aborted = Outcomes(), set[str](), set[str]()
    for step in range(5000):
        for arrival in arrivals:
            request_id = arrival.request.request_id
            if arrival.at_step == step:
                try:
                    engine.submit(arrival.request)
                except InvalidRequest:
                    refused.add(request_id)
            if arrival.abort_after is not None and arrival.at_step + arrival.abort_after == step:
                if request_id not in refused and not outcomes[request_id].endings:
                    aborted.add(request_id)
                engine.abort(request_id)
                engine.check_integrity()
        if engine.has_work():
            batch = engine.step()
            outcomes.take(batch.outputs)
            engine.check_integrity()
            assert not aborted & {output.request_id for output in batch.outputs}
        elif step > max(a.at_step + (a.abort_after or 0) for a in arrivals):
            return outcomes, refused, aborted
    raise AssertionError("the engine does not come to an end")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(
    arrivals=workloads(),
    num_blocks=st.sampled_from([4, 7, 10, 16, 64]),
    token_budget=st.sampled_from([1, 3, 8, 20, 64]),
    max_running=st.sampled_from([1, 2, 4, 8]),
)
@pytest.mark.slow
def test_a_batched_paged_cached_preempted_request_gives_what_it_gives_alone(
    arrivals: list[Arrival], num_blocks: int, token_budget: int, max_running: int
) -> None:
    runner = FakeRunner(num_blocks, BLOCK_SIZE, VOCAB_SIZE)
    engine = make_engine(runner, max_running, token_budget)
    max_context_tokens = num_blocks * BLOCK_SIZE
    outcomes, refused, aborted = drive(engine, arrivals)

    for arrival in arrivals:
        request = arrival.request
        num_tokens = len(request.prompt_token_ids) + len(request.resume_from)
        assert (request.request_id in refused) == (num_tokens >= max_context_tokens)
        if request.request_id in refused:
            continue
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


def test_the_workloads_above_do_preempt_evict_and_chunk() -> None:
    runner = FakeRunner(num_blocks=8, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE)
    engine = make_engine(runner, max_running=4, token_budget=8)
    requests = [greedy(f"r{i}", [i + 1] * 12, 30) for i in range(6)]
    outcomes = run_to_end(engine, *requests)
    for request in requests:
        assert outcomes[request.request_id].token_ids == generate_alone(request, 64)[0]
    load = engine.load()
    assert load.num_preemptions > 0
    assert runner.num_computed_tokens > 6 * 41, "nothing was recomputed"


# ---- single behaviours ----------------


def test_a_second_request_with_the_same_prompt_computes_only_what_is_not_cached() -> None:
    runner = FakeRunner(num_blocks=32)
    engine = make_engine(runner)
    prompt = list(range(1, 21))
    first = run_to_end(engine, greedy("first", prompt, 4))["first"]
    assert first.cached[0] == 0
    before = runner.num_computed_tokens
    second = run_to_end(engine, greedy("second", prompt, 4))["second"]
    assert second.token_ids == first.token_ids
    assert second.cached == [16, 0, 0, 0], "said once, on the first output"
    assert runner.num_computed_tokens - before == 4 + 3
    load = engine.load()
    assert (load.prefix_hit_tokens, load.prefix_query_tokens) == (16, 40)


def test_the_last_prompt_token_is_computed_even_if_all_is_cached() -> None:
    engine = make_engine(FakeRunner(num_blocks=32))
    prompt = list(range(1, 17))
    run_to_end(engine, greedy("first", prompt, 4))
    assert run_to_end(engine, greedy("second", prompt, 4))["second"].cached[0] == 8


def test_the_next_turn_of_a_conversation_finds_the_answer_cached_too() -> None:
    engine = make_engine(FakeRunner(num_blocks=32))
    prompt = list(range(1, 13))
    answer = run_to_end(engine, greedy("turn 1", prompt, 21))["turn 1"].token_ids
    turn = run_to_end(engine, greedy("turn 2", [*prompt, *answer, 50, 51], 3))["turn 2"]
    assert turn.cached[0] == 32, "all four full blocks of the 32 tokens that were computed"


def test_requests_with_different_salts_share_no_block() -> None:
    runner = FakeRunner(num_blocks=32)
    engine = make_engine(runner)
    prompt = list(range(1, 33))
    for salt, num_cached in (("", 0), ("acme", 0), ("globex", 0), ("acme", 24)):
        outcome = run_to_end(engine, greedy("r", prompt, 3, cache_salt=salt))["r"]
        assert outcome.cached[0] == num_cached, salt


def test_an_abort_frees_all_blocks_before_the_next_step_and_gives_no_output() -> None:
    engine = make_engine(FakeRunner(num_blocks=32))
    engine.submit(greedy("gone", [1] * 20, 30))
    engine.submit(greedy("stays", [2] * 20, 30))
    engine.step()
    engine.abort("gone")
    engine.abort("gone")
    engine.abort("never seen")
    engine.check_integrity()
    load = engine.load()
    assert (load.num_running, load.num_free_blocks) == (1, 32 - 2), "12 of its 20 tokens are computed"
    assert [output.request_id for output in engine.step().outputs] == ["stays"]


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths() -> None:
    engine = make_engine(FakeRunner(num_blocks=4))
    with pytest.raises(InvalidRequest, match=r"has 32 tokens and the context holds 32"):
        engine.submit(greedy("long", [1] * 32, 4))
    engine.submit(greedy("fits", [1] * 31, 4))
    outcome = run_to_end(engine)["fits"]
    assert (len(outcome.token_ids), outcome.endings) == (1, ["length"]), "the context is full"


def test_a_request_id_in_use_is_refused() -> None:
    engine = make_engine(FakeRunner(num_blocks=8))
    engine.submit(greedy("same", [1], 4))
    with pytest.raises(InvalidRequest, match="'same' is in use"):
        engine.submit(greedy("same", [2], 4))


def test_a_stop_token_ends_the_request_and_is_not_in_its_output() -> None:
    prompt = [5, 6, 7]
    free, _ = generate_alone(greedy("r", prompt, 12), 4096)
    stop = free[5]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    engine = make_engine(FakeRunner(num_blocks=8))
    outcome = run_to_end(engine, GenerationRequest("r", prompt, sampling))["r"]
    assert outcome.token_ids == free[: free.index(stop)]
    assert outcome.endings == ["stop"]


def test_logits_that_are_not_finite_end_their_request_alone_and_leave_nothing_cached() -> None:
    runner = FakeRunner(num_blocks=32)
    runner.poison_token = 60
    engine = make_engine(runner)
    bad = [60] * 20
    healthy = greedy("healthy", [1, 2, 3], 6)
    engine.submit(greedy("bad", bad, 6))
    engine.submit(healthy)
    outputs = {output.request_id: output for output in engine.step().outputs}
    assert outputs["bad"].finish_reason == "error"
    assert "not finite" in outputs["bad"].error
    engine.check_integrity()
    tokens = outputs["healthy"].token_ids + run_to_end(engine)["healthy"].token_ids
    assert tokens == generate_alone(healthy, 4096)[0]
    runner.poison_token = -1
    assert run_to_end(engine, greedy("again", bad, 2))["again"].cached[0] == 0


def test_a_model_whose_first_step_is_not_finite_is_refused_at_start() -> None:
    runner = FakeRunner(num_blocks=4)
    engine = make_engine(runner)
    engine.compute_first_step()
    engine.check_integrity()
    runner.poison_token = 0
    with pytest.raises(ModelError, match="not finite"):
        engine.compute_first_step()


def test_a_resumed_generation_continues_with_the_tokens_it_would_have_had() -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=9, ignore_eos=True, repetition_penalty=1.3)
    prompt = [4, 4, 8]
    whole = run_to_end(make_engine(FakeRunner(32)), GenerationRequest("r", prompt, sampling))["r"].token_ids
    assert len(whole) == 20
    for cut in (1, 7, 19):
        resumed = GenerationRequest("r", prompt, sampling, resume_from=whole[:cut])
        assert run_to_end(make_engine(FakeRunner(32)), resumed)["r"].token_ids == whole[cut:]


def test_long_prompts_do_not_stall_running_streams() -> None:
    engine = make_engine(FakeRunner(num_blocks=64), token_budget=16)
    engine.submit(greedy("stream", [1, 2], 60))
    engine.step()
    engine.submit(greedy("long", [3] * 200, 4))
    for _ in range(13):
        assert "stream" in {output.request_id for output in engine.step().outputs}
