"""Router and HAProxy: always started again, ever more slowly, and killed when they hang."""

from __future__ import annotations

from headrace.control.essentials import HUNG_AFTER_S, Essential


def test_the_first_end_is_answered_at_once_and_further_ones_ever_more_slowly() -> None:
    essential = Essential("router")
    waits = []
    now_s = 0.0
    assert essential.is_due(now_s)
    for _ in range(9):
        essential.on_start(now_s)
        assert not essential.is_due(now_s)
        essential.on_ended(now_s, "gone")
        waits.append(essential.due_s - now_s)
        now_s = essential.due_s
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert essential.is_due(now_s), "it is never given up"
    assert essential.state == "failing"


def test_a_minute_of_health_forgets_earlier_ends() -> None:
    essential = Essential("router")
    for _ in range(5):
        essential.on_start(0.0)
        essential.on_ended(0.0, "gone")
    essential.on_start(100.0)
    essential.on_ended(160.0, "gone")
    assert essential.due_s == 160.0


def test_one_that_says_nothing_hangs() -> None:
    essential = Essential("haproxy")
    essential.on_start(0.0)
    assert not essential.is_hung(HUNG_AFTER_S)
    assert essential.is_hung(HUNG_AFTER_S + 0.1)
    essential.heard_s = 10.0
    assert not essential.is_hung(HUNG_AFTER_S + 0.1)
    assert essential.state == "running"
