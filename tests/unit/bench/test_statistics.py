"""Percentiles and summaries against their definition, computed by brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.statistics import percentile, summarise

SAMPLES = st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=200)


@given(samples=SAMPLES, percent=st.integers(min_value=1, max_value=100))
def test_a_percentile_is_the_smallest_sample_that_enough_samples_do_not_exceed(
    samples: list[float], percent: int
) -> None:
    found = percentile(sorted(samples), percent / 100)
    candidates = [
        value for value in samples if 100 * sum(other <= value for other in samples) >= percent * len(samples)
    ]
    assert found == min(candidates)


@given(samples=SAMPLES)
def test_a_summary_is_ordered_and_does_not_depend_on_the_samples_order(samples: list[float]) -> None:
    summary = summarise(samples)
    assert summary is not None
    assert min(samples) <= summary.p50 <= summary.p90 <= summary.p99 <= summary.max == max(samples)
    assert summary.count == len(samples)
    assert summary.mean == pytest.approx(sum(samples) / len(samples), abs=1e-6)
    assert summary == summarise(reversed(samples))


def test_a_summary_of_nothing_is_none() -> None:
    assert summarise([]) is None


def test_a_scale_turns_seconds_into_milliseconds() -> None:
    summary = summarise([0.001, 0.003], 1e3)
    assert summary is not None
    assert math.isclose(summary.mean, 2.0)
    assert (summary.p50, summary.max) == (1.0, 3.0)


def test_known_percentiles_of_one_to_ten() -> None:
    samples = [float(value) for value in range(1, 11)]
    assert [percentile(samples, ratio) for ratio in (0.1, 0.5, 0.9, 0.99, 1.0)] == [1, 5, 9, 10, 10]
