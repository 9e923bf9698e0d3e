"""The simulated engine: its texts, its step time, and its queue."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams
from headrace.clock import VirtualClock
from headrace.engine.simulated import SimulatedEngine
from headrace.errors import InvalidRequest


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
