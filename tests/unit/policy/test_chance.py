"""The exact binomial tail, against the sum that defines it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.chance import chance_of


@given(of=st.integers(0, 60), num=st.integers(0, 61), ratio=st.floats(0.0, 1.0))
def test_beyond_the_expected_number_it_is_the_sum_of_all_that_is_no_better(
    of: int, num: int, ratio: float
) -> None:
    tail = sum(math.comb(of, k) * ratio**k * (1 - ratio) ** (of - k) for k in range(num, of + 1))
    if num <= of * ratio:
        assert chance_of(num, of, ratio) == 1.0
    else:
        assert chance_of(num, of, ratio) == pytest.approx(tail, rel=1e-9, abs=1e-300)


@given(of=st.integers(1, 10**9), ratio=st.floats(0.0, 1.0), parts=st.tuples(*[st.floats(0.0, 1.0)] * 2))
def test_more_of_as_many_is_never_likelier_however_many_there_are(
    of: int, ratio: float, parts: tuple[float, float]
) -> None:
    fewer, more = sorted(round(of * part) for part in parts)
    assert 0.0 <= chance_of(more, of, ratio) <= chance_of(fewer, of, ratio) <= 1.0


def test_among_a_million_it_costs_no_more_terms_than_matter() -> None:
    assert 0.01 < chance_of(20_300, 1_000_000, 0.02) < 0.03
    assert chance_of(1_000_000, 1_000_000, 0.02) == 0.0
