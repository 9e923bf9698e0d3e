"""What a replica can serve: the algebra against its own definition, and its limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.messages import StepModel
from headrace.policy.scaling_capacity import (
    EngineLimits,
    RequestShape,
    capacity_of,
    mean_model,
    measured_ratio,
    model_of_costs,
    times,
)

MODEL = StepModel(a=0.01, b=20e-6, q=1e-9, c=0.0005, d=1e-8)
SHAPE = RequestShape(prompt_tokens=1000.0, cached_ratio=0.25, output_tokens=200.0)

positive = st.floats(1e-6, 0.05)
shapes = st.builds(RequestShape, st.floats(1, 8000), st.floats(0, 1), st.floats(1, 2000))


def test_a_full_batch_costs_its_requests_little_more_than_their_own_work() -> None:
    one = capacity_of(MODEL, SHAPE, EngineLimits(1))
    many = capacity_of(MODEL, SHAPE, EngineLimits(32))
    assert many.work_s == one.work_s
    assert one.mean_request_s == pytest.approx(one.work_s + 200 * 0.01)
    assert many.mean_request_s == pytest.approx(many.work_s + 200 * 0.01 / 32)
    assert many.bound == "32 requests fit one batch"


@given(a=positive, b=st.floats(0, 1e-4), c=st.floats(0, 1e-3), shape=shapes, itl_s=st.floats(0.002, 0.5))
def test_a_full_replica_keeps_the_slo_between_tokens_and_its_batch(
    a: float, b: float, c: float, shape: RequestShape, itl_s: float
) -> None:
    model = StepModel(a=a, b=b, q=0.0, c=c, d=0.0)
    capacity = capacity_of(model, shape, EngineLimits(64, itl_s=itl_s))
    per_s = 1 / capacity.mean_request_s
    step_s = a / (1 - per_s * capacity.work_s)
    batch = per_s * shape.output_tokens * step_s
    assert batch <= 64 * (1 + 1e-6)
    if itl_s > a / 0.95:
        assert step_s <= itl_s * (1 + 1e-6)
    whole_s = capacity.request_s + shape.prompt_tokens * capacity.prompt_token_s
    assert whole_s == pytest.approx(capacity.mean_request_s, rel=1e-6)


def test_an_slo_that_no_step_keeps_bounds_nothing_and_is_told() -> None:
    capacity = capacity_of(MODEL, SHAPE, EngineLimits(32, itl_s=0.005))
    assert capacity.mean_request_s == capacity_of(MODEL, SHAPE, EngineLimits(32)).mean_request_s
    assert "no replica keeps the SLO" in capacity.bound


def test_memory_for_keys_and_values_bounds_the_batch() -> None:
    assert capacity_of(MODEL, SHAPE, EngineLimits(32, num_kv_tokens=4800)).max_batch == 4
    assert capacity_of(MODEL, SHAPE, EngineLimits(32, num_kv_tokens=10)).max_batch == 1


def test_cached_tokens_cost_nothing() -> None:
    cold = capacity_of(MODEL, RequestShape(1000.0, 0.0, 200.0), EngineLimits(32))
    warm = capacity_of(MODEL, RequestShape(1000.0, 0.9, 200.0), EngineLimits(32))
    assert warm.prompt_token_s < 0.2 * cold.prompt_token_s


def test_models_of_several_engines_are_averaged_and_nonsense_is_left_out() -> None:
    other = times(MODEL, 3.0)
    nonsense = [
        StepModel(math.nan, 0, 0, 0, 0),
        StepModel(math.inf, 0, 0, 0, 0),
        StepModel(0, 0, 0, 0, 0),
        StepModel(1e9, 0, 0, 0, 0),
    ]
    mean = mean_model([MODEL, other, *nonsense])
    assert mean is not None
    assert (mean.a, mean.c) == pytest.approx((0.02, 0.001))
    assert mean_model(nonsense) is None


def test_an_engine_that_fits_no_model_is_described_by_its_costs() -> None:
    model = model_of_costs(20e-6, 0.003, 0.0005, mean_running=4.0)
    assert model is not None
    assert (model.a, model.b, model.c) == pytest.approx((0.01, 20e-6, 0.0005))
    assert model_of_costs(0.0, 0.0, 0.0, 1.0) is None
    assert model_of_costs(math.nan, 0.003, 0.0, 1.0) is None


def test_measured_engine_time_corrects_the_model_within_bounds() -> None:
    token_s = MODEL.a / 8 + MODEL.c + MODEL.d * 1100
    expected_s = 750 * (MODEL.b + MODEL.q * (250 + 751 / 2)) + 200 * token_s
    assert measured_ratio(1.5 * expected_s, MODEL, SHAPE, 8.0) == pytest.approx(1.5)
    assert measured_ratio(100 * expected_s, MODEL, SHAPE, 8.0) == 2.0
    assert measured_ratio(0.0, MODEL, SHAPE, 8.0) == 1.0
    assert measured_ratio(math.nan, MODEL, SHAPE, 8.0) == 1.0
