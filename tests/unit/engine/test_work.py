"""Work accounting: every nanosecond is somebody's or idle, and each pays for what it brought."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.step_model import StepContents
from headrace.engine.work import WorkAccount, decode_part, prompt_part, split

WEIGHTS = st.lists(st.floats(0, 1e9), min_size=1, max_size=64)


@given(st.integers(0, 10**13), WEIGHTS)
def test_parts_sum_exactly_and_each_is_within_a_nanosecond_of_its_due(
    total: int, weights: list[float]
) -> None:
    parts = split(total, weights)
    assert sum(parts) == total
    whole = sum(map(Fraction, weights))
    for part, weight in zip(parts, weights, strict=True):
        due = Fraction(total) * Fraction(weight) / whole if whole else Fraction(total, len(weights))
        # 2^-40 of the largest weight is what is lost of a weight.
        assert abs(part - due) <= 1 + Fraction(total, 1 << 39)


@given(
    st.integers(0, 10**12),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
)
def test_no_weight_breaks_the_sum(total: int, weights: list[float]) -> None:
    parts = split(total, weights)
    assert sum(parts) == total
    assert min(parts) >= 0
    for part, weight in zip(parts, weights, strict=True):
        if not 0 < weight < math.inf and any(0 < other < math.inf for other in weights):
            assert part == 0


def test_what_is_left_goes_to_the_largest_remainders_and_among_equals_to_the_first() -> None:
    assert split(10, [1.0, 1.0, 1.0]) == [4, 3, 3]
    assert split(7, [3.0, 2.0, 1.0]) == [4, 2, 1]
    assert split(5, [0.0, 0.0]) == [3, 2]


def test_time_before_work_comes_is_idle_and_time_with_work_is_the_requests() -> None:
    account = WorkAccount(1000)
    account.rest(1500)
    assert account.end_step(1800, [decode_part(1, 10)]) == [300]
    assert account.end_step(2000, [decode_part(1, 11)]) == [200]
    account.rest(2600)
    assert (account.busy_ns, account.idle_ns) == (500, 1100)


def test_a_clock_that_goes_back_stands_still() -> None:
    account = WorkAccount(1000)
    assert account.end_step(900, [decode_part(1, 10)]) == [0]
    account.rest(1100)
    assert (account.busy_ns, account.idle_ns) == (0, 100)


def test_before_anything_is_measured_an_output_token_counts_like_two_prompt_tokens() -> None:
    prompt, decode = WorkAccount(0).end_step(1200, [prompt_part(10, 0), decode_part(1, 9)])
    assert (prompt, decode) == (round(1200 * 10.5 / 13), round(1200 * 2.5 / 13))


def test_once_measured_each_pays_what_its_part_costs() -> None:
    """A machine on which a prompt token takes 1 ms and a decoded one 10, besides 4 ms per step."""
    account, now_ns = WorkAccount(0), 0

    def step(parts: list[StepContents]) -> list[int]:
        nonlocal now_ns
        num_prompt, _, num_decoded, *_ = map(sum, zip(*parts))
        now_ns += 4_000_000 + 1_000_000 * num_prompt + 10_000_000 * num_decoded
        return account.end_step(now_ns, parts)

    for size in range(1, 300):
        step([prompt_part(1 + size * 7 % 50, size), *[decode_part(1, 50 + size)] * (size % 9)])
    prompt, first, second = step([prompt_part(30, 5), decode_part(1, 40), decode_part(1, 40)])
    assert first == pytest.approx(second, abs=1)
    assert prompt == pytest.approx(30e6 + 4e6 / 3, rel=0.03)
    assert first == pytest.approx(10e6 + 4e6 / 3, rel=0.03)


def test_a_longer_context_pays_for_being_read() -> None:
    account, now_ns = WorkAccount(0), 0
    for index in range(600):
        parts = [decode_part(1, 100 + index % 300)] * (1 + index % 8)
        now_ns += 1_000_000 + sum(1000 * part.num_kv_tokens for part in parts)
        account.end_step(now_ns, parts)
    short, long = account.end_step(now_ns + 3_000_000, [decode_part(1, 100), decode_part(1, 1000)])
    assert long > 1.5 * short


def test_guesses_read_no_keys_of_their_own_but_each_attends_to_its_context() -> None:
    assert decode_part(1, 100) == StepContents(0, 0, 1, 100, 0)
    assert decode_part(4, 103) == StepContents(0, 0, 4, 103, 103 + 102 + 101)


def test_what_guesses_attend_to_is_learned_and_paid_for_without_making_prompts_look_long() -> None:
    account, now_ns = WorkAccount(0), 0
    for index in range(600):
        prompt = [prompt_part(20 + index % 7, index % 50)] * (index % 3 == 0)
        guessing = [decode_part(1 + index % 4, 400 + index % 90)] * (1 + index % 5)
        parts = [*prompt, *guessing]
        now_ns += 4_000_000 + 200_000 * sum(part.num_prompt_tokens for part in parts)
        now_ns += 300_000 * sum(part.num_decoded_tokens for part in parts)
        now_ns += 500 * sum(part.num_attended_tokens + part.num_guess_attended_tokens for part in parts)
        account.end_step(now_ns, parts)
    _, b, q, c, _ = account.fit.coefficients
    assert (b, q, c) == pytest.approx((200e-6, 500e-9, 300e-6), rel=0.05)
    assert account.fit.prefill_token_s == pytest.approx(b + q * 36, rel=0.05)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("rest"), st.integers(0, 10**10), st.just([])),
        st.tuples(
            st.just("step"),
            st.integers(0, 10**10),
            st.lists(
                st.one_of(
                    st.builds(prompt_part, st.integers(2, 8192), st.integers(0, 100_000)),
                    st.builds(decode_part, st.integers(1, 9), st.integers(1, 100_000)),
                ),
                min_size=1,
                max_size=32,
            ),
        ),
    ),
    max_size=60,
)


@given(st.integers(0, 10**15), STEPS)
def test_busy_and_idle_time_are_all_time_and_the_shares_are_the_busy_time(
    ready_ns: int, events: list[tuple[str, int, list[StepContents]]]
) -> None:
    account, now_ns, given_ns = WorkAccount(ready_ns), ready_ns, 0
    for kind, elapsed_ns, parts in events:
        now_ns += elapsed_ns
        if kind == "rest":
            account.rest(now_ns)
        else:
            shares = account.end_step(now_ns, parts)
            assert min(shares) >= 0
            given_ns += sum(shares)
        assert account.busy_ns == given_ns
        assert account.busy_ns + account.idle_ns == now_ns - ready_ns
