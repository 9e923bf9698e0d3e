"""How many tokens are guessed: by acceptance and a row's cost, with a reason; none where it does not pay."""

from __future__ import annotations

import random

import pytest

from headrace.engine.speculation.controller import DraftController
from headrace.engine.speculation.row_cost import RowCost

EVEN = [0.5] * 32


def after(rounds: int, num_drafts: int, num_accepted: int) -> DraftController:
    """A controller that made `num_drafts` guesses that many times."""
    controller = DraftController()
    for _ in range(rounds):
        controller.choose([0.7] * num_drafts, 0.0)
        controller.observe(num_drafts, num_accepted)
    return controller


def test_right_guesses_raise_the_number_and_wrong_ones_lower_it() -> None:
    numbers = [after(30, 4, accepted).choose(EVEN, 0.1).num_tokens for accepted in range(5)]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] > 8


def test_a_better_outlook_means_more_guesses() -> None:
    numbers = [DraftController().choose([p] * 32, 0.1).num_tokens for p in (0.05, 0.3, 0.5, 0.8, 0.99)]
    assert numbers == [0, 1, 3, 10, 32]


def test_a_dearer_row_means_fewer_guesses_and_none_from_one_token_on() -> None:
    numbers = [DraftController().choose([0.7] * 32, cost).num_tokens for cost in (0.0, 0.2, 0.5, 0.9, 1.0)]
    assert numbers == [8, 4, 1, 0, 0]
    assert "off: a row costs 7.00 tokens" in DraftController().choose(EVEN, 7.0).reason


@pytest.mark.parametrize(("p", "row_s"), [(0.3, 0.05), (0.6, 0.05), (0.6, 0.3), (0.9, 0.1), (0.9, 0.02)])
def test_the_rule_maximises_tokens_per_second(p: float, row_s: float) -> None:
    def tokens_per_s(num: int) -> float:
        return sum(p**j for j in range(num + 1)) / (1.0 + row_s * num)

    best = max(range(33), key=tokens_per_s)
    chosen = DraftController().choose([p] * 32, row_s * tokens_per_s(best)).num_tokens
    assert tokens_per_s(chosen) == pytest.approx(tokens_per_s(best), rel=0.01) or p**best < 0.05


@pytest.mark.parametrize("p", [0.2, 0.6, 0.95])
def test_it_learns_how_often_this_requests_guesses_are_right(p: float) -> None:
    """From a wrong outlook, with seed 1: the number it chooses is near the one for the true probability."""
    controller, generator = DraftController(), random.Random(1)
    numbers = []
    for _ in range(400):
        num = max(controller.choose(EVEN, 0.1).num_tokens, 1)
        controller.observe(num, next((i for i in range(num) if generator.random() > p), num))
        numbers.append(num)
    right = DraftController().choose([p] * 32, 0.1).num_tokens
    assert sum(numbers[200:]) / 200 == pytest.approx(right, rel=0.35, abs=0.5)


def test_a_request_that_is_off_tries_again_now_and_then_and_ever_more_rarely() -> None:
    controller = after(30, 4, 0)
    gaps, gap = [], 0
    for _ in range(1500):
        choice = controller.choose(EVEN, 0.3)
        gap += 1
        if choice.num_tokens:
            assert choice.reason.startswith("probe")
            assert choice.num_tokens == 1
            controller.observe(1, 0)
            gaps.append(gap)
            gap = 0
    assert gaps[:6] == [17, 33, 65, 129, 257, 257]


def test_probes_that_succeed_turn_it_on_again() -> None:
    controller = after(30, 4, 0)
    for _ in range(2000):
        choice = controller.choose(EVEN, 0.3)
        if choice.num_tokens:
            controller.observe(choice.num_tokens, choice.num_tokens)
        if choice.reason.startswith("on"):
            return
    raise AssertionError("still off")


def test_without_anything_to_guess_nothing_is_guessed_and_nothing_learned() -> None:
    controller = DraftController()
    assert controller.choose([], 0.0) == (0, "nothing to guess")
    controller.observe(0, 0)
    assert controller.choose(EVEN, 0.1) == DraftController().choose(EVEN, 0.1)


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


def test_a_row_never_costs_more_than_its_share_of_the_whole_step() -> None:
    cost = RowCost()
    for _ in range(50):
        cost.observe(2, 1e-3)
        cost.observe(4, 30e-3)
    assert cost.row_s <= 32e-3 / 6
    assert cost.step_s(0) >= 0
