"""What routers are told of requests that changed their place."""

from __future__ import annotations

from headrace.replica.moves import MAX_TOLD, TOLD_FOR_S, Moves


def test_only_what_moved_is_told_and_for_a_while() -> None:
    moves = Moves()
    moves.note("stays", "a", "a", 1.0)
    moves.note("moves", "a", "b", 1.0)
    assert moves.recent(1.0) == {"moves": "b"}
    assert moves.recent(1.0 + TOLD_FOR_S) == {"moves": "b"}
    assert moves.recent(1.1 + TOLD_FOR_S) == {}


def test_one_that_comes_back_is_told_too() -> None:
    moves = Moves()
    moves.note("r", "a", "b", 1.0)
    moves.note("r", "a", "a", 2.0)
    assert moves.recent(2.0) == {"r": "a"}


def test_one_that_ended_is_told_no_more() -> None:
    moves = Moves()
    moves.note("r", "a", "b", 1.0)
    moves.forget("r")
    moves.forget("unknown")
    assert moves.recent(1.0) == {}


def test_a_report_is_bounded_and_the_newest_are_in_it() -> None:
    moves = Moves()
    for number in range(MAX_TOLD + 10):
        moves.note(f"r{number}", "a", "b", 1.0)
    told = moves.recent(1.0)
    assert len(told) == MAX_TOLD
    assert f"r{MAX_TOLD + 9}" in told
    assert "r9" not in told
