"""How many tokens are guessed: by acceptance and a row's cost, with a reason; none where it does not pay."""

from __future__ import annotations

import random

import pytest

from headrace.engine.speculation.controller import DraftController
from headrace.engine.speculation.row_cost import RowCost


def after(rounds: int, num_drafts: int, num_accepted: int) -> DraftController:
    controller = DraftController()
    for _ in range(rounds):
        controller.observe(num_drafts, num_accepted)
    return controller


def test_right_guesses_raise_the_number_and_wrong_ones_lower_it() -> None:
    numbers = [after(10, 4, accepted).choose(32, 0.1).num_tokens for accepted in range(5)]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] == 32


def test_a_dearer_row_means_fewer_guesses_and_none_from_one_token_on() -> None:
    controller = after(10, 4, 2)
    numbers = [controller.choose(32, row_tokens).num_tokens for row_tokens in (0.05, 0.2, 0.5, 0.9, 1.0, 7.0)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > 2
    assert numbers[-3:] == [0, 0, 0]
    assert "off: a row costs 7.00 tokens" in controller.choose(32, 7.0).reason


def test_the_rule_maximises_tokens_per_second() -> None:
    """Against all other numbers of guesses, with the acceptance known."""
    for p, row_s in ((0.3, 0.05), (0.6, 0.05), (0.6, 0.3), (0.9, 0.1)):
        controller = DraftController()
        generator = random.Random(1)
        for _ in range(2000):
            num_accepted = next((i for i in range(8) if generator.random() > p), 8)
            controller.observe(8, num_accepted)
        p = controller.acceptance

        def tokens_per_s(num: int, p: float = p, row_s: float = row_s) -> float:
            return sum(p**j for j in range(num + 1)) / (1.0 + row_s * num)

        best = max(range(33), key=tokens_per_s)
        rate = tokens_per_s(best)
        assert abs(controller.choose(32, row_s * rate).num_tokens - best) <= 1


def test_a_request_that_is_off_tries_again_now_and_then_and_ever_more_rarely() -> None:
    controller = after(20, 4, 0)
    gaps, gap = [], 0
    for _ in range(1500):
        choice = controller.choose(8, 0.3)
        gap += 1
        if choice.num_tokens:
            assert choice.reason.startswith("probe")
            assert choice.num_tokens == 2
            controller.observe(choice.num_tokens, 0)
            gaps.append(gap)
            gap = 0
    assert gaps[:6] == [17, 33, 65, 129, 257, 257]


def test_a_probe_waits_until_there_is_something_to_guess() -> None:
    controller = after(20, 4, 0)
    choices = [controller.choose(8, 0.3).num_tokens for _ in range(20)]
    assert choices[16:] == [2, 2, 2, 2]


def test_probes_that_succeed_turn_it_on_again() -> None:
    controller = after(20, 4, 0)
    for _ in range(200):
        choice = controller.choose(8, 0.3)
        if choice.num_tokens:
            controller.observe(choice.num_tokens, choice.num_tokens)
        if choice.reason.startswith("on"):
            return
    raise AssertionError("still off")


def test_without_room_nothing_is_guessed_and_the_reason_says_so() -> None:
    assert DraftController().choose(0, 0.0)[0] == 0
    assert "no room" in DraftController().choose(0, 0.0).reason


def test_a_step_without_guesses_says_nothing_about_them() -> None:
    controller = DraftController()
    before = controller.acceptance
    controller.observe(0, 0)
    assert controller.acceptance == before


# ---- the cost of a row ----------------


def observe_steps(cost: RowCost, rows: list[int], step_s: float, row_s: float, noise: float = 0.0) -> None:
    generator = random.Random(3)
    for num_rows in rows:
        cost.observe(num_rows, (step_s + row_s * num_rows) * (1 + noise * generator.uniform(-1, 1)))


def test_a_rows_cost_is_found_and_follows_a_change() -> None:
    cost = RowCost()
    observe_steps(cost, [1, 8] * 100, 4e-3, 1e-4, noise=0.05)
    assert cost.row_s == pytest.approx(1e-4, rel=0.2)
    assert cost.step_s(4) == pytest.approx(4.4e-3, rel=0.1)
    observe_steps(cost, [32, 60] * 300, 2e-3, 3e-4, noise=0.05)
    assert cost.row_s == pytest.approx(3e-4, rel=0.2)


def test_before_rows_differ_a_row_costs_a_share_of_the_step() -> None:
    cost = RowCost()
    assert (cost.row_s, cost.step_s(1)) == (0.0, 0.0)
    observe_steps(cost, [1] * 50, 8e-3, 0.0)
    assert cost.row_s == pytest.approx(0.5e-3)
    observe_steps(cost, [8] * 50, 8e-3, 0.0)
    assert cost.row_s < 0.1e-3


def test_steps_all_alike_keep_the_last_slope_and_a_halted_process_changes_little() -> None:
    cost = RowCost()
    observe_steps(cost, [1, 8] * 50, 4e-3, 1e-4)
    slope = cost.row_s
    observe_steps(cost, [1] * 1000, 4e-3, 1e-4)
    assert cost.row_s == pytest.approx(slope, rel=0.3)
    cost.observe(1, 30.0)
    assert cost.step_s(1) < 5e-3


def test_steps_that_say_nothing_are_ignored() -> None:
    cost = RowCost()
    for rows, seconds in ((1, 0.0), (1, float("nan")), (1, float("inf")), (0, 1.0)):
        cost.observe(rows, seconds)
    assert cost.row_s == 0.0
