"""Decoding OpenAI's requests, and what an error says."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    RequestDecoder,
    describe_error,
    refuse_unsupported,
)
from headrace.errors import InvalidRequest, Overloaded

CHAT = RequestDecoder(ChatCompletionRequest)
COMPLETION = RequestDecoder(CompletionRequest)
MESSAGES = [{"role": "user", "content": "hi"}]


def decode_chat(**fields: Any) -> ChatCompletionRequest:
    return CHAT.decode(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def test_a_request_is_decoded_and_unknown_fields_are_ignored() -> None:
    request = decode_chat(
        temperature=1, stop=["a"], store=True, stream_options={"include_usage": True, "x": 1}
    )
    assert request.messages[0].content == "hi"
    assert (request.temperature, request.stop) == (1.0, ["a"])
    assert request.stream_options is not None
    assert request.stream_options.include_usage


def test_null_is_as_good_as_absent() -> None:
    request = decode_chat(max_tokens=None, stop=None, stream=None, n=None, logit_bias=None, tools=None)
    refuse_unsupported(request)
    assert request == decode_chat()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": "two"}, "n", "expected int | null, got str"),
        ({"n": 1.5}, "n", "expected int | null, got float"),
        ({"stream": 1}, "stream", "expected bool | null, got int"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": 1}]}, "messages[0].role", "expected str, got int"),
        ({"stop": [1]}, "stop[0]", "expected str"),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...]", "expected float"),
        ({"stream_options": 1}, "stream_options", "expected object | null"),
    ],
)
def test_a_wrong_type_names_the_field_and_what_is_allowed(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_chat(**fields)
    assert caught.value.param == param
    assert words in caught.value.message


@given(st.binary(max_size=100))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    for decoder in (CHAT, COMPLETION):
        with contextlib.suppress(InvalidRequest):
            decoder.decode(body)


@pytest.mark.parametrize("body", [b'{"model":"m","prompt":' + b"[" * 100_000, b"[" * 100_000])
def test_deep_nesting_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        COMPLETION.decode(body)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{}]},
        {"functions": [{}]},
        {"guided_whitespace_pattern": " "},
        {"audio": {"voice": "x"}},
    ],
)
def test_what_is_known_and_not_supported_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not supported") as caught:
        refuse_unsupported(decode_chat(**fields))
    assert caught.value.param in fields
    assert caught.value.code == "unsupported_parameter"


def test_harmless_values_of_unsupported_fields_pass() -> None:
    refuse_unsupported(decode_chat(tools=[], response_format={"type": "text"}))
    refuse_unsupported(COMPLETION.decode(b'{"model":"m","prompt":"x","best_of":1,"echo":false,"suffix":""}'))


def test_an_error_has_openais_shape() -> None:
    error = describe_error(Overloaded("full", param="x", code="c", retry_after_s=1))
    assert json.loads(msgspec.json.encode(error)) == {
        "error": {"message": "full", "type": "server_error", "param": "x", "code": "c"}
    }
