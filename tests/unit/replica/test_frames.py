"""Frames are what json.dumps makes of OpenAI's chunk objects."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headrace.api.openai import ChatLogprob, ChatLogprobs, PromptTokensDetails, Usage
from headrace.errors import Overloaded
from headrace.replica.frames import StreamFrames, error_frame

USAGE = Usage(3, 4, 7, PromptTokensDetails(1))


def frames(*, is_chat: bool, has_usage: bool = False) -> StreamFrames:
    return StreamFrames("id-1", 123, 'a "model"', "print", is_chat=is_chat, has_usage=has_usage)


def as_event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chunk(is_chat: bool, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "id": "id-1",
        "object": "chat.completion.chunk" if is_chat else "text_completion",
        "created": 123,
        "model": 'a "model"',
        "system_fingerprint": "print",
        "choices": choices,
        **more,
    }


def choice(index: int, reason: str | None = None, **part: Any) -> dict[str, Any]:
    return {"index": index, **part, "logprobs": None, "finish_reason": reason}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.integers(0, 99))
def test_a_piece_of_text(text: str, is_chat: bool, index: int) -> None:
    part: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
    assert frames(is_chat=is_chat).text(index, text) == as_event(chunk(is_chat, [choice(index, **part)]))


def test_a_text_never_breaks_the_event() -> None:
    assert frames(is_chat=True).text(0, "a\n\nb\r\ndata: [DONE]").count(b"\n") == 2


def test_usage_is_null_until_the_last_chunk() -> None:
    made = frames(is_chat=True, has_usage=True)
    part = choice(0, delta={"content": "x"})
    assert made.text(0, "x") == as_event(chunk(True, [part], usage=None))
    details = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    usage = {**details, "prompt_tokens_details": {"cached_tokens": 1}}
    assert made.usage(USAGE) == as_event(chunk(True, [], usage=usage))


def test_the_first_and_the_last_frame_of_a_choice() -> None:
    role = choice(2, delta={"role": "assistant", "content": ""})
    assert frames(is_chat=True).role(2) == as_event(chunk(True, [role]))
    assert frames(is_chat=False).role(2) == b""
    assert frames(is_chat=True).finish(1, "stop") == as_event(chunk(True, [choice(1, "stop", delta={})]))
    assert frames(is_chat=False).finish(1, "stop") == as_event(chunk(False, [choice(1, "stop", text="")]))


def test_logprobs_go_with_their_text() -> None:
    logprobs = ChatLogprobs([ChatLogprob("x", -0.5, [120], [])])
    part = choice(0, delta={"content": "x"})
    part["logprobs"] = {
        "content": [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}],
        "refusal": None,
    }
    assert frames(is_chat=True).text_with_logprobs(0, "x", logprobs) == as_event(chunk(True, [part]))


def test_an_error_is_an_event_of_its_own() -> None:
    event = json.loads(error_frame(Overloaded("full")).removeprefix(b"data: "))
    assert event == {
        "error": {"message": "full", "type": "server_error", "param": None, "code": "overloaded"}
    }
