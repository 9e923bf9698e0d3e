"""How likely a request's guesses are taken to be, by what became of those before; and when it tries again."""

from __future__ import annotations

import random

import pytest

from headrace.engine.speculation.controller import DraftController

EVEN = [0.5] * 32


def after(rounds: int, num_drafts: int, num_accepted: int) -> DraftController:
    """A controller that made `num_drafts` guesses that many times."""
    controller = DraftController()
    for _ in range(rounds):
        controller.expect([0.7] * num_drafts)
        controller.settle(num_drafts)
        controller.observe(num_drafts, num_accepted)
    return controller


def test_right_guesses_raise_what_is_expected_and_wrong_ones_lower_it() -> None:
    firsts = [after(30, 4, accepted).expect(EVEN)[:1] for accepted in range(5)]
    assert firsts == sorted(firsts)
    assert firsts[0] < [0.1]
    assert firsts[-1] > [0.9]


def test_each_guess_is_right_only_if_all_before_it_are() -> None:
    expected = DraftController().expect([0.9, 0.5, 0.5])
    assert expected == pytest.approx([0.9, 0.45, 0.225])


def test_guesses_that_hardly_ever_come_true_are_not_offered() -> None:
    assert len(DraftController().expect([0.5] * 32)) == 4
    assert DraftController().expect([0.04]) == []


@pytest.mark.parametrize("p", [0.2, 0.6, 0.95])
def test_it_learns_how_often_this_requests_guesses_are_right(p: float) -> None:
    """From a wrong outlook, with seed 1."""
    controller, generator = DraftController(), random.Random(1)
    firsts = []
    for _ in range(400):
        num = max(len(controller.expect(EVEN)), 1)
        firsts.append(controller._expected[0])
        controller.settle(num)
        controller.observe(num, next((i for i in range(num) if generator.random() > p), num))
    assert sum(firsts[200:]) / 200 == pytest.approx(p, abs=0.1)


def test_a_request_whose_guesses_do_not_pay_tries_one_now_and_then_and_ever_more_rarely() -> None:
    controller = DraftController()
    gaps, gap = [], 0
    for _ in range(1500):
        controller.expect(EVEN)
        gap += 1
        if num := controller.settle(0):
            assert num == 1
            controller.observe(1, 0)
            gaps.append(gap)
            gap = 0
    assert gaps[:6] == [17, 33, 65, 129, 257, 257]


def test_a_probe_that_succeeds_shortens_the_next_pause() -> None:
    controller = DraftController()
    gaps, gap = [], 0
    for _ in range(600):
        controller.expect(EVEN)
        gap += 1
        if controller.settle(0):
            controller.observe(1, len(gaps) >= 3)
            gaps.append(gap)
            gap = 0
    assert gaps[:6] == [17, 33, 65, 129, 17, 17]


def test_without_anything_to_guess_nothing_is_guessed_and_nothing_learned() -> None:
    controller = DraftController()
    for _ in range(100):
        assert controller.expect([]) == []
        assert controller.settle(0) == 0
    controller.observe(0, 0)
    assert controller.expect(EVEN) == DraftController().expect(EVEN)
