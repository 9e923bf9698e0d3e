"""Which answers are certainly short: what is unclear is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.answer_size import MAX_SHORT_TOKENS
from headrace.policy.prompt import read_prompt


def is_short_stream(body: bytes) -> bool:
    return read_prompt(body, len(body), "").is_short_stream


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [], "stream": True, "max_tokens": 10, **fields}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": MAX_SHORT_TOKENS},
        {"max_tokens": 100, "n": 5},
        {"max_tokens": None, "max_completion_tokens": 5},
        {"logprobs": False},
        {"prompt": "text"},
    ],
)
def test_a_stream_with_a_small_limit_is_short(fields: dict[str, Any]) -> None:
    assert is_short_stream(body(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False},
        {"stream": None},
        {"stream": 1},
        {"max_tokens": None},
        {"max_tokens": MAX_SHORT_TOKENS + 1},
        {"max_tokens": 5, "max_completion_tokens": MAX_SHORT_TOKENS + 1},
        {"max_tokens": 5.5},
        {"max_tokens": -5, "n": -200},
        {"max_tokens": 300, "n": 2},
        {"max_tokens": 5, "n": "many"},
        {"logprobs": True},
        {"logprobs": 0},
        {"prompt": ["one", "two"]},
        {"prompt": [1, 2]},
    ],
)
def test_whatever_is_unclear_is_not(fields: dict[str, Any]) -> None:
    assert not is_short_stream(body(**fields))


@given(st.integers(0, 200))
def test_a_body_that_is_cut_off_is_not(num_bytes: int) -> None:
    whole = body()
    assert is_short_stream(whole[:num_bytes]) == (num_bytes >= len(whole))


@given(st.binary(max_size=100))
def test_no_bytes_raise(data: bytes) -> None:
    assert not is_short_stream(data)
