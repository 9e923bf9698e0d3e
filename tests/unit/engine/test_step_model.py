"""The step model: found from steps with noise, kept when recent steps say nothing, never nonsense."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.step_model import StepContents, StepModelFit
from headrace.engine.work import decode_part, prompt_part
from headrace.policy.step_time import decode_token_s, request_s, step_s


@dataclass(frozen=True)
class Machine:
    """A machine whose steps take what the model says."""

    a: float = 0.004
    b: float = 8e-5
    q: float = 4e-8
    c: float = 3e-4
    d: float = 2e-7

    def step_s(self, contents: StepContents) -> float:
        p, pc, d, kv, _ = contents
        return self.a + self.b * p + self.q * pc + self.c * d + self.d * kv


MACHINE = Machine()


def total(parts: list[StepContents]) -> StepContents:
    return StepContents(*map(sum, zip(*parts)))


def mixed_step(source: random.Random) -> StepContents:
    """A busy engine: batches of up to 32 at any context, a third of the steps with a piece of a prompt."""
    parts = []
    if source.random() < 0.33:
        parts.append(prompt_part(source.randint(1, 512), source.randint(0, 4000)))
    for _ in range(source.randint(0 if parts else 1, 32)):
        parts.append(decode_part(1, source.randint(1, 4000)))
    return total(parts)


def mixed(fit: StepModelFit, num_steps: int, noise: float = 0.0, machine: Machine = MACHINE) -> None:
    source = random.Random(5)
    for _ in range(num_steps):
        contents = mixed_step(source)
        fit.observe(machine.step_s(contents) * (1 + source.gauss(0, noise)), contents)


def worst_error(fit: StepModelFit, machine: Machine, seed: int = 9) -> float:
    """The worst relative error over steps of other random numbers than those that were learned from."""
    source, model = random.Random(seed), fit.model
    assert model is not None
    worst = 0.0
    for _ in range(200):
        contents = mixed_step(source)
        p, pc, d, kv, _ = contents
        predicted_s = step_s(model, p, pc / p if p else 0.0, d, kv)
        worst = max(worst, abs(predicted_s / machine.step_s(contents) - 1))
    return worst


def test_the_coefficients_are_found() -> None:
    fit = StepModelFit()
    mixed(fit, 600)
    assert fit.coefficients == pytest.approx((0.004, 8e-5, 4e-8, 3e-4, 2e-7), rel=0.02)
    assert worst_error(fit, MACHINE) < 0.01


def test_noise_of_a_tenth_is_averaged_away_and_reported_as_the_error() -> None:
    fit = StepModelFit()
    mixed(fit, 3000, noise=0.1)
    assert worst_error(fit, MACHINE) < 0.06
    # The mean of |gauss(0, 0.1)| is 0.08.
    assert fit.relative_error == pytest.approx(0.08, abs=0.015)
    assert fit.prefill_token_s == pytest.approx(8e-5 + 4e-8 * 2256, rel=0.1)
    assert fit.step_per_request_s == pytest.approx(3e-4 + 2e-7 * 2000, rel=0.1)
    assert fit.decode_token_s == pytest.approx(3e-4 + 2e-7 * 2000 + 0.004 / 16, rel=0.1)


def test_the_error_is_that_of_predictions_made_before() -> None:
    """Of steps that take now half, now double, whatever they hold, none can be known before."""
    fit, source = StepModelFit(), random.Random(3)
    for _ in range(2000):
        fit.observe(source.choice((0.005, 0.02)), total([decode_part(1, 500)] * 8))
    best = min((abs(x - 0.005) / 0.005 + abs(x - 0.02) / 0.02) / 2 for x in (0.005, 0.0125, 0.02))
    assert fit.relative_error >= 0.9 * best


def test_a_change_is_followed_and_the_past_is_forgotten() -> None:
    fit = StepModelFit()
    mixed(fit, 1000)
    slower = Machine(0.008, 2.4e-4, 8e-8, 1.5e-4, 4e-7)
    mixed(fit, 3000, machine=slower)
    assert worst_error(fit, slower) < 0.05
    assert fit.relative_error < 0.05


def test_nothing_is_measured_before_the_first_step() -> None:
    fit = StepModelFit()
    for seconds, contents in [
        (0.0, StepContents(1, 1, 1, 1)),
        (-1.0, StepContents(1, 1)),
        (math.nan, StepContents(1, 1)),
        (math.inf, StepContents(1, 1)),
        (1.0, StepContents()),
    ]:
        fit.observe(seconds, contents)
    assert (fit.prefill_token_s, fit.decode_token_s, fit.model, fit.relative_error) == (0.0, 0.0, None, 0.0)


def test_one_prompt_is_enough_for_a_first_estimate() -> None:
    fit = StepModelFit()
    contents = prompt_part(500, 0)
    fit.observe(MACHINE.step_s(contents), contents)
    assert 4e-5 < fit.prefill_token_s < 1.6e-4
    assert fit.decode_token_s == 0.0


def test_a_short_prompt_alone_says_nothing_of_what_prompts_cost() -> None:
    """Its time is the step's fixed part. Told as the price of its tokens, it made a new engine look thirty
    times as fast as its siblings, and took the prompts that those had cached."""
    fit = StepModelFit()
    contents = prompt_part(14, 0)
    for _ in range(100):
        fit.observe(MACHINE.step_s(contents), contents)
        assert fit.prefill_token_s == 0.0, "what is fixed and what each takes cannot be told apart"
    fit = StepModelFit()
    for step in range(100):
        for each in (contents, decode_part(1, 15)):
            fit.observe(MACHINE.step_s(each), each)
        assert fit.prefill_token_s == 0.0 or step > 5
    assert 4e-5 < fit.prefill_token_s < 1.6e-4


def test_each_of_the_first_steps_counts_at_once() -> None:
    fit = StepModelFit()
    for contents in (prompt_part(14, 0), decode_part(1, 15), prompt_part(500, 0)):
        fit.observe(MACHINE.step_s(contents), contents)
    assert fit.prefill_token_s == pytest.approx(MACHINE.b + MACHINE.q * 250, rel=0.2)


def test_the_same_batch_for_ever_gives_the_cost_of_its_tokens() -> None:
    fit = StepModelFit()
    for _ in range(500):
        fit.observe(0.010, total([decode_part(1, 100)] * 8))
    assert fit.decode_token_s == pytest.approx(0.010 / 8, rel=0.01)
    assert fit.prefill_token_s == 0.0
    assert fit.relative_error < 0.01


def test_decodes_alone_are_predicted_though_not_every_coefficient_can_be_told() -> None:
    """Always eight requests whose contexts grow: what is fixed and what each takes cannot be told apart."""
    fit, source = StepModelFit(), random.Random(4)
    context = 100
    for _ in range(3000):
        contents = total([decode_part(1, context)] * 8)
        fit.observe(MACHINE.step_s(contents) * (1 + source.gauss(0, 0.02)), contents)
        context = context + 1 if context < 1000 else 100
    assert fit.relative_error < 0.03
    model = fit.model
    assert model is not None
    for context in (100, 500, 1000):
        expected_s = MACHINE.step_s(total([decode_part(1, context)] * 8))
        assert step_s(model, num_decoded_tokens=8, num_kv_tokens=8 * context) == pytest.approx(
            expected_s, rel=0.02
        )


def test_what_prompts_cost_is_kept_through_a_long_time_without_them() -> None:
    fit = StepModelFit()
    mixed(fit, 600)
    before = fit.coefficients
    for step in range(10_000):
        contents = total([decode_part(1, 100 + step % 900)] * 8)
        fit.observe(MACHINE.step_s(contents), contents)
    assert fit.coefficients[1:3] == pytest.approx(before[1:3], rel=0.15)


def test_a_stopped_process_does_not_spoil_the_fit() -> None:
    fit = StepModelFit()
    mixed(fit, 600)
    fit.observe(60.0, total([decode_part(1, 2000)] * 8))
    assert worst_error(fit, MACHINE) < 0.15
    mixed(fit, 100)
    assert worst_error(fit, MACHINE) < 0.1


def test_steps_stopped_now_and_then_change_little() -> None:
    fit, source = StepModelFit(), random.Random(6)
    for _ in range(3000):
        contents = mixed_step(source)
        stopped = 20.0 if source.random() < 0.02 else 1.0
        fit.observe(MACHINE.step_s(contents) * stopped, contents)
    assert worst_error(fit, MACHINE) < 0.25


def test_impossibly_short_times_are_forgotten() -> None:
    fit = StepModelFit()
    for _ in range(20):
        fit.observe(1e-9, total([decode_part(1, 2000)] * 8))
    mixed(fit, 6000)
    assert worst_error(fit, MACHINE) < 0.05


STEPS = st.lists(
    st.tuples(
        st.floats(allow_nan=True, allow_infinity=True),
        st.integers(0, 65536),
        st.integers(0, 1 << 40),
        st.integers(0, 1024),
        st.integers(0, 1 << 40),
    ),
    min_size=1,
    max_size=80,
)


@given(STEPS)
def test_no_coefficient_is_ever_negative_or_infinite(steps: list[tuple[float, int, int, int, int]]) -> None:
    fit = StepModelFit()
    for seconds, *contents in steps:
        fit.observe(seconds, StepContents(*contents))
        derived = (fit.prefill_token_s, fit.decode_token_s, fit.step_per_request_s, fit.relative_error)
        assert all(0 <= value < math.inf for value in (*fit.coefficients, *derived))


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 2000), st.integers(1, 64))
def test_a_requests_time_is_the_sum_of_its_parts_of_steps(
    num_uncached: int, num_cached: int, num_output: int, num_decoding: int
) -> None:
    fit = StepModelFit()
    mixed(fit, 64)
    model = fit.model
    assert model is not None
    prompt = prompt_part(num_uncached, num_cached) if num_uncached else StepContents()
    expected_s = model.b * prompt.num_prompt_tokens + model.q * prompt.num_attended_tokens
    for index in range(num_output):
        expected_s += decode_token_s(model, num_decoding, num_uncached + num_cached + index)
    measured_s = request_s(model, num_uncached, num_output, num_cached, num_decoding)
    assert measured_s == pytest.approx(expected_s, rel=0.01)
