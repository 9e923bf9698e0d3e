"""What streamed chunks mean for a request's record, however they are cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.answer import AnswerRecorder, describe_error
from headrace.bench.record import RequestRecord


def event(tree: object) -> bytes:
    return b"data: " + json.dumps(tree).encode() + b"\n\n"


ROLE = event({"id": "a", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
TOKEN = event({"choices": [{"index": 0, "delta": {"content": "é"}, "logprobs": None}]})
FINISH = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
DONE = b"data: [DONE]\n\n"


def answer(status: int = 200) -> AnswerRecorder:
    recorder = AnswerRecorder(RequestRecord(0, scheduled_s=1.0))
    recorder.status = status
    return recorder


def test_only_chunks_with_text_are_token_times() -> None:
    recorder = answer()
    for position, data in enumerate([ROLE, TOKEN, TOKEN, FINISH, USAGE, DONE]):
        recorder.feed(data, 2.0 + position)
    recorder.finish(99.0)
    record = recorder.record
    assert record.is_ok
    assert list(record.token_times) == [3.0, 4.0]
    assert (record.ttft_s, record.end_to_end_s, record.gaps_s()) == (2.0, 6.0, [1.0])
    assert (record.num_prompt_tokens, record.num_output_tokens) == (7, 3)
    assert record.tpot_s == (7.0 - 3.0) / 2


@given(cuts=st.lists(st.integers(0, len(ROLE + TOKEN * 3 + FINISH + USAGE + DONE)), max_size=12))
def test_any_split_gives_the_same_counts(cuts: list[int]) -> None:
    stream = ROLE + TOKEN * 3 + FINISH + USAGE + DONE
    recorder = answer()
    bounds = [0, *sorted(cuts), len(stream)]
    for start, end in itertools.pairwise(bounds):
        recorder.feed(stream[start:end], 2.0)
    recorder.finish(3.0)
    assert recorder.record.is_ok
    assert len(recorder.record.token_times) == 3
    assert recorder.record.num_completion_tokens == 3


@pytest.mark.parametrize(
    "piece",
    [
        {"text": "x"},
        {"delta": {"content": "x"}},
        {"delta": {"reasoning_content": "x"}},
        {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}},
    ],
)
def test_text_reasoning_and_tool_calls_are_output(piece: dict[str, object]) -> None:
    recorder = answer()
    recorder.feed(event({"choices": [{"index": 0, **piece}]}), 2.0)
    assert list(recorder.record.token_times) == [2.0]


@pytest.mark.parametrize(
    ("status", "body", "kind", "detail"),
    [
        (0, b"", "disconnected", "before an answer"),
        (500, b'{"error": {"message": "it broke"}}', "http_500", "it broke"),
        (404, b"nothing here", "http_404", "nothing here"),
        (200, TOKEN, "cut", "after 1 chunks"),
        (200, b'{"choices": []}', "malformed", "not an event stream"),
        (200, b"data: {oops\n\n", "malformed", "not a chunk"),
        (200, TOKEN + event({"error": {"message": "engine died"}}) + DONE, "error_event", "engine died"),
    ],
)
def test_each_bad_answer_has_its_kind(status: int, body: bytes, kind: str, detail: str) -> None:
    recorder = answer(status)
    if body:
        recorder.feed(body, 2.0)
    recorder.finish(3.0)
    assert not recorder.record.is_ok
    assert recorder.record.error == kind
    assert detail in recorder.record.error_detail


def test_an_error_body_is_cut_to_a_readable_length() -> None:
    assert len(describe_error(b"x" * 100_000)) == 300
    assert describe_error(b"") == "no body"
    assert describe_error(b'{"error": "plain"}') == "plain"
