"""When a dead engine is started again."""

from __future__ import annotations

from headrace.replica.restart import EngineEnd, RestartPolicy


def end(at_s: float, ready_at_s: float | None = None, *, is_retryable: bool = True) -> EngineEnd:
    return EngineEnd(at_s, ready_at_s, "broke", is_retryable)


def test_the_wait_doubles_up_to_its_limit() -> None:
    policy = RestartPolicy()
    delays = [policy.decide(end(i, i - 1.0)).delay_s for i in range(9)]
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_a_healthy_time_resets_the_wait() -> None:
    policy = RestartPolicy()
    for _ in range(4):
        policy.decide(end(1.0, 0.0))
    assert policy.decide(end(100.0, 70.0)).delay_s == 0.1


def test_five_ends_in_a_row_without_getting_ready_are_enough() -> None:
    policy = RestartPolicy()
    decisions = [policy.decide(end(float(i))) for i in range(5)]
    assert [decision.delay_s is None for decision in decisions] == [False] * 4 + [True]
    assert "5 times" in decisions[-1].reason
    assert "broke" in decisions[-1].reason


def test_an_engine_that_got_ready_is_started_again_however_often() -> None:
    policy = RestartPolicy()
    assert all(policy.decide(end(i + 1.0, float(i))).delay_s is not None for i in range(50))


def test_an_error_that_starting_again_cannot_help_ends_it_at_once() -> None:
    decision = RestartPolicy().decide(end(1.0, is_retryable=False))
    assert decision.delay_s is None
    assert "cannot help" in decision.reason
