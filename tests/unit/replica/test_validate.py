"""From wire fields to sampling parameters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import SamplingParams
from headrace.api.openai import ChatCompletionRequest, CompletionRequest
from headrace.engine.request import check_sampling
from headrace.errors import InvalidRequest
from headrace.replica.validate import (
    ModelLimits,
    build_sampling,
    choose_max_tokens,
    count_choices,
    parse_stops,
    split_prompts,
)

LIMITS = ModelLimits(vocab_size=100, max_context_tokens=50)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(model="chat", prompt="x", **fields)


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="chat", messages=[], **fields)


def test_defaults_are_openais_and_the_rest_of_the_context() -> None:
    assert build_sampling(completion(), LIMITS, 20, seed=9) == SamplingParams(max_tokens=30, seed=9)


def test_every_field_arrives() -> None:
    request = chat(
        max_completion_tokens=10,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"7": -100},
        logprobs=True,
        top_logprobs=3,
        seed=-1,
        stop_token_ids=[1, 2],
        ignore_eos=True,
        min_tokens=2,
    )
    assert build_sampling(request, LIMITS, 20, seed=9) == SamplingParams(
        max_tokens=10,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={7: -100},
        num_logprobs=3,
        seed=2**63 - 1,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        min_tokens=2,
    )


def test_logprobs_without_top_logprobs_are_of_the_sampled_token_only() -> None:
    assert build_sampling(chat(logprobs=True), LIMITS, 1, 0).num_logprobs == 0
    assert build_sampling(completion(logprobs=0), LIMITS, 1, 0).num_logprobs == 0
    assert build_sampling(chat(logprobs=False), LIMITS, 1, 0).num_logprobs == -1


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(-1, 3),
            "top_p": st.floats(-0.5, 1.5),
            "top_k": st.integers(-3, 300),
            "min_p": st.floats(-0.5, 1.5),
            "presence_penalty": st.floats(-3, 3),
            "repetition_penalty": st.floats(-1, 20),
            "max_tokens": st.integers(-2, 60),
            "min_tokens": st.integers(-2, 60),
            "seed": st.integers(),
            "logprobs": st.integers(-2, 30),
            "logit_bias": st.dictionaries(st.integers(-5, 120).map(str), st.floats(-150, 150), max_size=3),
            "stop_token_ids": st.lists(st.integers(-2, 120), max_size=3),
        },
    )
)
def test_what_is_let_through_never_fails_in_the_engine(fields: dict[str, Any]) -> None:
    try:
        sampling = build_sampling(completion(**fields), LIMITS, 20, seed=0)
    except InvalidRequest as error:
        refused = error.param
    else:
        refused = None
    if refused is not None:
        assert refused in fields
        return
    check_sampling(sampling, LIMITS.vocab_size)
    assert 0 <= sampling.seed < 2**63


@pytest.mark.parametrize("num_prompt_tokens", [50, 51, 1000])
def test_a_prompt_that_fills_the_context_is_refused_with_both_lengths(num_prompt_tokens: int) -> None:
    with pytest.raises(
        InvalidRequest, match=f"{num_prompt_tokens} tokens and the context holds 50"
    ) as caught:
        choose_max_tokens(chat(), LIMITS, num_prompt_tokens)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_two_different_limits_are_refused_and_two_equal_ones_are_not() -> None:
    assert choose_max_tokens(chat(max_tokens=3, max_completion_tokens=3), LIMITS, 1) == 3
    with pytest.raises(InvalidRequest, match="mean the same"):
        choose_max_tokens(chat(max_tokens=3, max_completion_tokens=4), LIMITS, 1)


def test_stops_are_one_or_several() -> None:
    assert parse_stops(None) == []
    assert parse_stops("a") == ["a"]
    assert parse_stops(["a", "b"]) == ["a", "b"]
    with pytest.raises(InvalidRequest, match="1025 characters"):
        parse_stops("x" * 1025)


def test_choices_are_bounded_over_all_prompts() -> None:
    assert count_choices(completion(), 64) == 1
    with pytest.raises(InvalidRequest, match="66 choices"):
        count_choices(completion(n=2), 33)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_come_in_four_shapes(prompt: Any, prompts: list[Any]) -> None:
    assert split_prompts(prompt) == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [True], [1.5], [None], [[1], "a"]])
def test_other_shapes_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="list of token ids"):
        split_prompts(prompt)
