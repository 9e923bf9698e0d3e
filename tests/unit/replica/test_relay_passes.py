"""The passes of a relayed request: which answer is none, how often and when it is sent again."""

from __future__ import annotations

import pytest

from headrace.replica.relay_passes import AGAIN_LIMIT_S, LAST, MAX_AGAIN_S, MAX_REFUSED, Passes, read_word

AGAIN = b"HTTP/1.1 503 X\r\nX-Headrace-Again: %b\r\ncontent-length: 2\r\n\r\nno"


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (AGAIN % b"1", "away"),
        (AGAIN % b"refused", "refused"),
        (b"HTTP/1.1 503 X\r\nretry-after: 1\r\n\r\n\r\nx-headrace-again: refused\r\n", "answer"),
        (b"HTTP/1.1 200 OK\r\nx-headrace-again: refused\r\n\r\n", "answer"),
        (b"HTTP/1.1 503 X\r\na: " + b"x" * 70_000, "answer"),
        (b"", "unknown"),
    ],
)
def test_only_what_haproxy_marks_in_its_head_is_no_answer(answer: bytes, word: str) -> None:
    assert read_word(answer) == word


def test_a_word_is_read_whole_however_it_comes() -> None:
    answer = AGAIN % b"refused"
    end = answer.index(b"\r\n\r\n") + 4
    assert {read_word(answer[:size]) for size in range(end)} == {"unknown"}
    assert {read_word(answer[:size]) for size in range(end, len(answer) + 1)} == {"refused"}


def test_refused_passes_come_again_after_longer_and_longer_until_the_last_one() -> None:
    passes, names, pauses = Passes(), [], []
    while (name := passes.begin()) != LAST:
        names.append(name)
        pause_s = passes.pause_s("refused", 0.0)
        assert pause_s is not None
        pauses.append(pause_s)
    assert len(set(names)) == len(names) == MAX_REFUSED
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_AGAIN_S
    assert passes.pause_s("refused", 0.0) is None, "whatever HAProxy says of the last one"


def test_a_router_that_is_away_is_waited_for_from_the_moment_at_which_it_is_missed() -> None:
    passes = Passes()
    passes.begin()
    assert passes.pause_s("away", 1000.0) is not None
    assert passes.pause_s("away", 1000.0 + AGAIN_LIMIT_S) is not None
    assert passes.pause_s("refused", 1001.0 + AGAIN_LIMIT_S) is not None, "it was there"
    assert passes.pause_s("away", 1002.0 + AGAIN_LIMIT_S) is not None
    assert passes.pause_s("away", 1003.0 + 2 * AGAIN_LIMIT_S) is None
