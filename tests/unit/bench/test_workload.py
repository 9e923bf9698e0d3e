"""Prompts, lengths and arrivals: deterministic, and of the distribution that was asked for."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.workload import (
    Lengths,
    Workload,
    WorkloadError,
    arrival_times,
    parse_lengths,
)


def prompt_of(workload: Workload, index: int) -> list[str]:
    tree: dict[str, Any] = json.loads(workload.body(index))
    return str(tree["messages"][0]["content"]).split()


def test_a_request_depends_on_seed_and_index_only() -> None:
    workload = Workload("m", input_tokens=parse_lengths("10-50"), seed=3)
    later = workload.body(5)
    for index in range(5):
        workload.body(index)
    assert workload.body(5) == later
    assert workload.body(6) != later
    assert workload.with_seed(4).body(5) != later


def test_a_prompt_has_the_words_that_were_asked_for() -> None:
    assert len(prompt_of(Workload("m", input_tokens=Lengths("fixed", 77)), 0)) == 77


def test_prompts_share_the_asked_prefix_and_no_more() -> None:
    plain = Workload("m", input_tokens=Lengths("fixed", 64))
    shared = Workload("m", input_tokens=Lengths("fixed", 64), shared_prefix_tokens=32)
    assert prompt_of(plain, 0)[:8] != prompt_of(plain, 1)[:8]
    assert prompt_of(shared, 0)[:32] == prompt_of(shared, 1)[:32]
    assert prompt_of(shared, 0)[32:40] != prompt_of(shared, 1)[32:40]
    assert len(prompt_of(shared, 0)) == 64


def test_the_body_asks_for_a_stream_with_usage() -> None:
    tree = json.loads(
        Workload("m", "completions", ignore_eos=True, output_tokens=Lengths("fixed", 9)).body(0)
    )
    assert tree["stream"] is True
    assert tree["stream_options"] == {"include_usage": True}
    assert (tree["max_tokens"], tree["ignore_eos"]) == (9, True)
    assert isinstance(tree["prompt"], str)
    assert "ignore_eos" not in json.loads(Workload("m").body(0))


@pytest.mark.parametrize("text", ["128", "64-256", "normal:128,32", "exponential:100"])
def test_lengths_are_written_as_they_are_read(text: str) -> None:
    assert str(parse_lengths(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "a", "20-10", "normal:5", "normal:nan,1", "zipf:3", "1-", "exponential:inf", "99999999"],
)
def test_bad_lengths_say_what_is_allowed(text: str) -> None:
    with pytest.raises(WorkloadError, match="length"):
        parse_lengths(text)


@given(seed=st.integers(0, 1000), text=st.sampled_from(["7", "3-9", "normal:4,10", "exponential:2"]))
def test_every_length_is_at_least_one(seed: int, text: str) -> None:
    lengths, source = parse_lengths(text), random.Random(seed)
    values = [lengths.sample(source) for _ in range(50)]
    assert min(values) >= 1
    if text == "3-9":
        assert min(values) >= 3
        assert max(values) <= 9


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    times = list(itertools.islice(arrival_times(50.0, "poisson", seed=1), 20_001))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert variance**0.5 == pytest.approx(mean, rel=0.05)
    assert times[0] == 0.0
    assert times == list(itertools.islice(arrival_times(50.0, "poisson", seed=1), 20_001))


def test_fixed_gaps_do_not_drift() -> None:
    assert next(itertools.islice(arrival_times(30.0, "fixed", 0), 3_000_000, None)) == 100_000.0
