"""HAProxy's completion lines: decoding, and which terminal state each stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import TerminalState
from headrace.gateway.completions import MAX_LINE_BYTES, Completion, CompletionDecoder, classify

LINE = (
    b'{"id":"hr-%d","backend":"ep-chat","server":"s","status":200,"termination":"--",'
    b'"first_byte_ms":1,"retries":"+1"}\n'
)


@pytest.mark.parametrize(
    ("status", "termination", "state"),
    [
        (200, "--", TerminalState.FINISHED),
        (200, "CD", TerminalState.ABORTED),
        (-1, "CR", TerminalState.ABORTED),
        (200, "cD", TerminalState.ABORTED),
        (200, "SD", TerminalState.FAILED),
        (200, "sD", TerminalState.FAILED),
        (400, "--", TerminalState.REFUSED),
        (404, "LR", TerminalState.REFUSED),
        (408, "cR", TerminalState.ABORTED),
        (500, "--", TerminalState.FAILED),
        (502, "SH", TerminalState.FAILED),
        (503, "LR", TerminalState.REFUSED),
        (503, "--", TerminalState.REFUSED),
        (503, "SC", TerminalState.FAILED),
        (504, "sH", TerminalState.FAILED),
    ],
)
def test_each_end_has_one_state(status: int, termination: str, state: TerminalState) -> None:
    assert classify(Completion("a", status=status, termination=termination)) is state


@given(st.lists(st.integers(1, 200), max_size=20))
def test_lines_cut_anywhere_are_put_together(cuts: list[int]) -> None:
    data = b"".join(LINE % number for number in range(10))
    decoder, ids = CompletionDecoder(), list[str]()
    for cut in cuts:
        ids += [completion.id for completion in decoder.feed(data[:cut])]
        data = data[cut:]
    ids += [completion.id for completion in decoder.feed(data)]
    assert ids == [f"hr-{number}" for number in range(10)]
    assert decoder.num_ignored == 0


def test_nonsense_is_counted_and_the_rest_is_read() -> None:
    decoder = CompletionDecoder()
    data = b'nonsense\n{"id":5}\n\xff\xfe\n' + LINE % 1 + b"x" * (MAX_LINE_BYTES + 1)
    assert [completion.id for completion in decoder.feed(data)] == ["hr-1"]
    assert decoder.num_ignored == 4
    assert [completion.id for completion in decoder.feed(b"\n" + LINE % 2)] == ["hr-2"]
