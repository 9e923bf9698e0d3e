"""When a silent host is given up: at once when its time is over, later when it was away and is back."""

from __future__ import annotations

from headrace.fabric.silence import Silence

LOST_AFTER_S = 10.0


def given_up_at_s(probes: dict[float, bool]) -> float:
    """When it is given up that could be reached, or not, from these moments on."""
    silence = Silence(0.0, LOST_AFTER_S)
    can_reach = True
    for tenth in range(1000):
        now_s = tenth / 10
        can_reach = probes.get(now_s, can_reach)
        silence.note_probe(can_reach)
        if silence.is_given_up(now_s):
            return now_s
    raise AssertionError("never")


def test_one_that_cannot_be_reached_is_given_up_after_its_time() -> None:
    assert given_up_at_s({0.0: False}) == LOST_AFTER_S


def test_one_that_can_be_reached_all_the_time_hangs_and_is_given_up_after_its_time() -> None:
    assert given_up_at_s({0.0: True}) == LOST_AFTER_S


def test_one_that_was_away_and_is_back_gets_as_long_again_and_not_for_ever() -> None:
    for back_s in (0.5, 5.0, 10.0):
        given_up_s = given_up_at_s({0.1: False, back_s: True})
        assert 2 * LOST_AFTER_S < given_up_s < 2.5 * LOST_AFTER_S


def test_one_that_is_away_again_is_given_up_after_its_time() -> None:
    assert given_up_at_s({0.1: False, 5.0: True, 8.0: False}) == LOST_AFTER_S
    assert given_up_at_s({0.1: False, 5.0: True, 12.0: False}) == 12.0
