"""The simulated engine: its texts, its step time, and its queue."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import VirtualClock
from headrace.engine.simulated import SimulatedEngine
from headrace.errors import InvalidRequest
from headrace.policy.step_time import step_s


def make_engine(clock: VirtualClock | None = None, **settings: Any) -> SimulatedEngine:
    clock = clock or VirtualClock()
    return SimulatedEngine(EngineSpec("simulated", "simulated", **settings), clock, clock.advance)


def request(
    request_id: str = "r", max_tokens: int = 40, prompt: bytes = b"hello", **fields: Any
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=fields.pop("seed", 1))
    return GenerationRequest(request_id, list(prompt), sampling, **fields)


def generate(engine: SimulatedEngine, *requests: GenerationRequest) -> dict[str, bytes]:
    for each in requests:
        engine.submit(each)
    texts: dict[str, bytes] = {each.request_id: b"" for each in requests}
    while engine.has_work():
        for output in engine.step().outputs:
            texts[output.request_id] += bytes(output.token_ids)
    return texts


def test_every_text_says_that_it_is_simulated_and_has_max_tokens_tokens() -> None:
    text = generate(make_engine(), request(max_tokens=100))["r"]
    assert text.startswith(b"[simulated] ")
    assert len(text) == 100
    assert text.decode("ascii").isprintable()


def test_texts_depend_on_prompt_and_seed_alone() -> None:
    texts = generate(
        make_engine(),
        request("a", 200),
        request("b", 200),
        request("c", 200, seed=2),
        request("d", 200, prompt=b"other"),
    )
    assert texts["a"] == texts["b"]
    assert len({texts["a"], texts["c"], texts["d"]}) == 3


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 39])
def test_a_resumed_text_goes_on_where_it_was(cut: int) -> None:
    whole = generate(make_engine(), request())["r"]
    assert generate(make_engine(), request(resume_from=list(whole[:cut])))["r"] == whole[cut:]


def test_steps_lie_on_a_grid_while_busy_and_begin_anew_after_a_pause() -> None:
    clock = VirtualClock()
    engine = make_engine(clock, simulated_step_s=1.0)
    clock.advance(10.0)
    engine.submit(request(max_tokens=4))
    engine.step()
    assert clock.now_s() == 11.0
    clock.advance(0.25)  # The process was late.
    engine.step()
    assert clock.now_s() == 12.0
    clock.advance(5.5)
    engine.step()
    assert clock.now_s() == 18.5
    assert engine.load().step_s == 1.0


def test_max_running_requests_run_and_the_others_wait() -> None:
    engine = make_engine(max_running=2)
    for name in "abc":
        engine.submit(request(name, max_tokens=3))
    first = engine.step()
    assert [output.request_id for output in first.outputs] == ["a", "b"]
    assert (first.load.num_running, first.load.num_waiting) == (2, 1)
    engine.abort("a")
    assert {output.request_id for output in engine.step().outputs} == {"b", "c"}
    engine.abort("b")
    engine.abort("nobody")
    assert engine.load().num_running == 1


def test_a_request_ends_when_the_context_is_full() -> None:
    engine = make_engine(max_context_tokens=16)
    engine.submit(request(prompt=b"x" * 14, max_tokens=99))
    reasons = [engine.step().outputs[0].finish_reason for _ in range(2)]
    assert reasons == [None, "length"]
    with pytest.raises(InvalidRequest, match="16 tokens and the context holds 16"):
        engine.submit(request(prompt=b"x" * 16))


def test_an_id_in_use_is_refused_while_waiting_and_while_running() -> None:
    engine = make_engine(max_running=1)
    for name in "ab":
        engine.submit(request(name))
    engine.step()
    for name in "ab":
        with pytest.raises(InvalidRequest, match="is in use"):
            engine.submit(request(name))


def test_logprobs_are_given_when_asked_for() -> None:
    engine = make_engine()
    engine.submit(GenerationRequest("r", [1], SamplingParams(num_logprobs=1)))
    output = engine.step().outputs[0]
    assert output.logprobs is not None
    assert output.logprobs[0].top == [(output.token_ids[0], 0.0)]


PROMPT = bytes(range(200))


def costly(clock: VirtualClock | None = None, **settings: Any) -> SimulatedEngine:
    """An engine whose prompt tokens cost a tenth of a millisecond."""
    return make_engine(clock, **{"simulated_prefill_token_s": 1e-4, **settings})


def cached_tokens(engine: SimulatedEngine, *requests: GenerationRequest) -> dict[str, int]:
    for each in requests:
        engine.submit(each)
    cached = dict.fromkeys((each.request_id for each in requests), 0)
    while engine.has_work():
        for output in engine.step().outputs:
            cached[output.request_id] += output.num_cached_tokens
        engine.check_integrity()
    return cached


def test_a_prompt_costs_time_unless_it_is_cached() -> None:
    clock = VirtualClock()
    engine = costly(clock)
    start_s = clock.now_s()
    assert cached_tokens(engine, request("a", 1, PROMPT)) == {"a": 0}
    assert clock.now_s() - start_s == pytest.approx(0.005 + 200e-4)
    start_s = clock.now_s()
    assert cached_tokens(engine, request("b", 1, PROMPT)) == {"b": 192}
    assert clock.now_s() - start_s == pytest.approx(0.005 + 8e-4)


def test_a_long_prompt_is_computed_in_chunks_beside_running_requests() -> None:
    clock = VirtualClock()
    engine = costly(clock, token_budget=64)
    engine.submit(request("runs", 50, b"x"))
    engine.step()
    engine.submit(request("long", 5, PROMPT))
    gaps, last_s = [], clock.now_s()
    is_first_out = False
    while not is_first_out:
        outputs = engine.step().outputs
        gaps.append(clock.now_s() - last_s)
        last_s = clock.now_s()
        is_first_out = any(output.request_id == "long" for output in outputs)
        assert any(output.request_id == "runs" for output in outputs)
    assert len(gaps) == 4
    assert max(gaps) <= 0.005 + 64e-4 + 1e-9


def test_other_salts_share_nothing_and_the_declared_prefix_is_shared() -> None:
    engine = costly()
    salted = {"cache_salt": "acme", "num_shared_tokens": 100}
    cached = cached_tokens(engine, request("a", 1, PROMPT, **salted))
    cached |= cached_tokens(engine, request("b", 1, PROMPT, cache_salt="other"))
    cached |= cached_tokens(engine, request("c", 1, PROMPT, **{**salted, "cache_salt": "third"}))
    cached |= cached_tokens(engine, request("d", 1, PROMPT, **salted))
    assert cached == {"a": 0, "b": 0, "c": 96, "d": 192}


def test_evictions_are_told_and_a_small_memory_makes_requests_wait() -> None:
    engine = costly(kv_cache_bytes=400 * 1024)
    prompts = [bytes([number]) * 200 for number in range(4)]
    for number, prompt in enumerate(prompts):
        engine.submit(request(f"r{number}", 20, prompt))
    batch = engine.step()
    assert (batch.load.num_running, batch.load.num_waiting) == (1, 3)
    assert batch.load.num_uncomputed_tokens == 600
    evicted: list[bytes] = []
    while engine.has_work():
        evicted += engine.step().evicted
        engine.check_integrity()
    assert len(evicted) == len(set(evicted)) > 0
    assert cached_tokens(engine, request("again", 1, prompts[3])) == {"again": 192}


def test_a_prompt_larger_than_the_memory_is_still_answered() -> None:
    engine = costly(kv_cache_bytes=64 * 1024)
    assert len(generate(engine, request("r", 10, PROMPT))["r"]) == 10
    engine.check_integrity()


def test_an_abort_gives_its_blocks_back() -> None:
    engine = costly()
    engine.submit(request("a", 50, PROMPT))
    engine.step()
    engine.submit(request("b", 50, PROMPT[:20], seed=2))
    engine.abort("a")
    engine.abort("b")
    assert not engine.has_work()
    engine.check_integrity()
    assert engine.load().num_free_blocks == engine.load().num_total_blocks


def test_costs_are_measured() -> None:
    engine = costly()
    for number in range(40):
        cached_tokens(engine, request(f"r{number}", 5, bytes([number]) * 200))
    load = engine.load()
    assert load.prefill_token_s == pytest.approx(1e-4, rel=0.05)
    assert load.decode_token_s == pytest.approx(0.005, rel=0.1)


def test_every_nanosecond_is_a_requests_or_idle() -> None:
    clock = VirtualClock(5.0)
    engine = costly(clock)
    told: dict[str, int] = {}
    clock.advance(0.25)
    engine.submit(request("a", 30, PROMPT))
    engine.submit(request("b", 12, PROMPT[:20], seed=2))
    for _ in range(10):
        told.update({output.request_id: output.engine_ns for output in engine.step().outputs})
    engine.submit(request("c", 5, PROMPT, seed=3))
    while engine.has_work():
        told.update({output.request_id: output.engine_ns for output in engine.step().outputs})
    clock.advance(0.5)
    load = engine.load()
    assert load.idle_ns == 750_000_000
    assert sum(told.values()) == load.busy_ns
    assert load.busy_ns + load.idle_ns == clock.now_ns() - 5_000_000_000
    assert load.step_model is not None


def test_planning_gets_the_step_model_that_was_set() -> None:
    engine = costly()
    for number in range(60):
        cached_tokens(engine, request(f"r{number}", 5, bytes([number]) * (50 + number * 5)))
    model = engine.load().step_model
    assert model is not None
    assert step_s(model, 300, 150) == pytest.approx(0.005 + 300e-4, rel=0.05)
    assert step_s(model, num_decoded_tokens=1, num_kv_tokens=200) == pytest.approx(0.005, rel=0.05)
    assert model.relative_error < 0.05
