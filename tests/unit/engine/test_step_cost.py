"""The step's cost: found from steps with noise, kept when recent steps say nothing, never nonsense."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.step_cost import StepCost

A, B, D = 0.004, 8e-5, 3e-4


def mixed(
    cost: StepCost, num_steps: int, noise: float = 0.0, a: float = A, b: float = B, d: float = D
) -> None:
    """A busy engine: batches of up to 32, a third of the steps with a piece of a prompt."""
    source = random.Random(5)
    for _ in range(num_steps):
        num_prompt = source.randint(1, 512) if source.random() < 0.33 else 0
        num_decoding = source.randint(0 if num_prompt else 1, 32)
        seconds = a + b * num_prompt + d * num_decoding
        cost.observe(seconds * (1 + source.gauss(0, noise)), num_prompt, num_decoding)


def test_the_coefficients_are_found() -> None:
    cost = StepCost()
    mixed(cost, 400)
    assert cost.coefficients == pytest.approx((A, B, D), rel=0.01)
    assert cost.prefill_token_s == pytest.approx(B, rel=0.01)


def test_noise_of_a_fifth_costs_a_tenth() -> None:
    cost = StepCost()
    mixed(cost, 2000, noise=0.2)
    assert cost.prefill_token_s == pytest.approx(B, rel=0.1)
    assert cost.decode_token_s == pytest.approx(D + A / 16, rel=0.1)


def test_a_change_is_followed_and_the_past_is_forgotten() -> None:
    cost = StepCost()
    mixed(cost, 1000)
    mixed(cost, 3000, a=2 * A, b=3 * B, d=D / 2)
    assert cost.coefficients == pytest.approx((2 * A, 3 * B, D / 2), rel=0.05)


def test_nothing_is_measured_before_the_first_step() -> None:
    cost = StepCost()
    assert (cost.prefill_token_s, cost.decode_token_s, cost.coefficients) == (0.0, 0.0, (0.0, 0.0, 0.0))
    for seconds, prompt, decoding in [
        (0.0, 1, 1),
        (-1.0, 1, 1),
        (math.nan, 1, 1),
        (math.inf, 1, 1),
        (1.0, 0, 0),
    ]:
        cost.observe(seconds, prompt, decoding)
    assert (cost.prefill_token_s, cost.decode_token_s) == (0.0, 0.0)


def test_one_prompt_is_enough_for_a_first_estimate() -> None:
    cost = StepCost()
    cost.observe(A + 500 * B, 500, 0)
    assert B / 2 < cost.prefill_token_s < 2 * B
    assert cost.decode_token_s == 0.0


def test_the_same_batch_for_ever_gives_the_cost_of_its_tokens() -> None:
    cost = StepCost()
    for _ in range(500):
        cost.observe(0.010, 0, 8)
    assert cost.decode_token_s == pytest.approx(0.010 / 8, rel=0.01)
    assert cost.prefill_token_s == 0.0


def test_the_cost_of_prompts_is_kept_through_a_long_time_without_them() -> None:
    cost = StepCost()
    mixed(cost, 600)
    for _ in range(10_000):
        cost.observe(A + 8 * D, 0, 8)
    assert cost.prefill_token_s == pytest.approx(B, rel=0.15)


def test_a_stopped_process_does_not_spoil_the_fit() -> None:
    cost = StepCost()
    mixed(cost, 600)
    cost.observe(60.0, 0, 8)
    mixed(cost, 60)
    assert cost.decode_token_s == pytest.approx(D + A / 16, rel=0.3)
    assert cost.prefill_token_s == pytest.approx(B, rel=0.3)


STEPS = st.lists(
    st.tuples(st.floats(1e-9, 1e6), st.integers(0, 65536), st.integers(0, 1024)), min_size=1, max_size=80
)


@given(STEPS)
def test_no_coefficient_is_ever_negative_or_infinite(steps: list[tuple[float, int, int]]) -> None:
    cost = StepCost()
    for step in steps:
        cost.observe(*step)
        assert all(math.isfinite(value) and value >= 0 for value in cost.coefficients)
        assert math.isfinite(cost.decode_token_s)
        assert cost.decode_token_s >= 0
