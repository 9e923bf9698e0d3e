"""Work: expected from what was learned, in the engine-seconds that engines measure."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.prompt import PromptHead
from headrace.policy.work import COST_MEMORY_S, MAX_TOKEN_S, LengthMean, WorkModel


def test_until_an_engine_measured_an_output_token_counts_twice_and_far_below_any_engine() -> None:
    model = WorkModel()
    assert model.work(0, 10) == 2 * model.work(10, 0)
    assert model.work(0, 1) < 1e-5
    assert not model.is_measured


def test_measured_costs_count_and_are_smoothed_over_time() -> None:
    model = WorkModel()
    model.observe_costs(0.001, 0.01, 0.0)
    assert model.work(100, 10) == pytest.approx(0.2)
    for tick in range(1, 21):
        model.observe_costs(0.003, 0.01, tick * COST_MEMORY_S / 20)
    assert model.prefill_token_s == pytest.approx(0.001 + 0.002 * (1 - math.exp(-1)))
    assert "s in" in repr(model)


def test_one_measured_cost_gives_the_other_by_the_usual_ratio() -> None:
    model = WorkModel()
    model.observe_costs(0.0, 0.01, 0.0)
    assert (model.prefill_token_s, model.decode_token_s) == (0.005, 0.01)
    model = WorkModel()
    model.observe_costs(0.004, 0.0, 0.0)
    assert (model.prefill_token_s, model.decode_token_s) == (0.004, 0.008)


@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats(allow_nan=False, allow_infinity=False))))
def test_no_report_and_no_clock_makes_costs_impossible(reports: list[tuple[float, float, float]]) -> None:
    model = WorkModel()
    for prefill_token_s, decode_token_s, now_s in reports:
        model.observe_costs(prefill_token_s, decode_token_s, now_s)
        assert 0 < model.prefill_token_s <= MAX_TOKEN_S
        assert 0 < model.decode_token_s <= 2 * MAX_TOKEN_S


def test_prompt_tokens_are_expected_by_the_size_that_was_learned() -> None:
    model = WorkModel()
    assert model.expected_prompt_tokens(PromptHead(num_bytes=400)) == 100
    for _ in range(200):
        model.learn(800, 100)
    assert model.bytes_per_token == pytest.approx(8, rel=0.01)
    assert model.expected_prompt_tokens(PromptHead(num_bytes=400)) == 50
    assert model.expected_prompt_tokens(PromptHead()) == 100, "no size: the usual length"
    model.learn(10**9, 1)
    model.learn(0, 10)
    assert model.bytes_per_token == pytest.approx(8, rel=0.01), "nonsense teaches nothing"


def test_output_tokens_are_expected_by_the_tenants_own_mean_up_to_what_is_allowed() -> None:
    model, mean = WorkModel(), LengthMean(0.0)
    model.output.learn(200)
    assert model.expected_output_tokens(PromptHead(), mean) == 200
    mean.learn(50)
    assert model.expected_output_tokens(PromptHead(), mean) == 50
    assert model.expected_output_tokens(PromptHead(max_output_tokens=8), mean) == 8
    for _ in range(200):
        mean.learn(100)
    assert mean.value == pytest.approx(100, rel=0.01)


def test_what_was_measured_counts_where_it_can_be_true() -> None:
    model = WorkModel()
    assert model.measured(0.5, 2.0, 10, 10) == model.work(10, 10), "in seconds only once tokens are"
    model.observe_costs(0.001, 0.01, 0.0)
    assert model.measured(0.5, 2.0, 10, 10) == 0.5
    assert model.measured(0.0, 2.0, 10, 10) == pytest.approx(0.11), "not measured"
    assert model.measured(3.5, 2.0, 10, 10) == pytest.approx(0.11), "longer than the request was open"
    assert model.measured(float("nan"), 2.0, 10, 10) == pytest.approx(0.11)
