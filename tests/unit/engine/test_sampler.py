"""The sampler: distributions, filters, penalties, and what must not matter."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.distribution import draw, token_logprobs, uniform
from headrace.engine.request import EngineRequest
from headrace.engine.sampler import Sampler

# Probabilities 0.4, 0.3, 0.2, 0.1 at ids 2, 0, 3, 1.
FOUR = np.log(np.array([0.3, 0.1, 0.4, 0.2], np.float32))


def make_request(
    sampling: SamplingParams,
    prompt: list[int] | None = None,
    generated: list[int] | None = None,
    eos: frozenset[int] = frozenset(),
) -> EngineRequest:
    request = GenerationRequest("r", prompt or [0], sampling, resume_from=generated or [])
    return EngineRequest(request, 0, eos, 4096)


def sample_one(logits: NDArray[np.float32], request: EngineRequest) -> int:
    return Sampler().sample(torch.from_numpy(logits)[None], [request])[0].token_id


def kept(sampling: SamplingParams, logits: NDArray[np.float32] = FOUR) -> list[int]:
    """The tokens that can be drawn, in order of their quantiles."""
    tokens = [draw(logits, sampling, (i + 0.5) / 2000) for i in range(2000)]
    return list(dict.fromkeys(tokens))


# ---- random numbers ----------------


def test_random_numbers_are_uniform_over_indices_and_over_seeds() -> None:
    for numbers in (
        [uniform(7, i) for i in range(20_000)],
        [uniform(i, 0) for i in range(20_000)],
        [uniform(i * 2**40, i) for i in range(20_000)],
    ):
        counts = np.bincount((np.array(numbers) * 100).astype(int), minlength=100)
        chi_square = ((counts - 200) ** 2 / 200).sum()
        assert chi_square < 160, "99 degrees of freedom: beyond the 99.99% quantile"


def test_neighbouring_random_numbers_are_not_correlated() -> None:
    numbers = np.array([[uniform(s, i) for i in range(100)] for s in range(200)])
    for left, right in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.03


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**20))
def test_a_random_number_is_in_its_range_and_a_function_of_its_arguments(seed: int, index: int) -> None:
    assert 0.0 <= uniform(seed, index) < 1.0
    assert uniform(seed, index) == uniform(seed, index)


def test_the_random_number_belongs_to_the_index_of_the_generated_token_not_to_its_position() -> None:
    flat = np.zeros(1000, np.float32)
    sampling = SamplingParams(seed=3, max_tokens=9)
    for num_generated in range(3):
        tokens = {sample_one(flat, make_request(sampling, [1] * n, [1] * num_generated)) for n in (1, 5, 9)}
        assert tokens == {int(uniform(3, num_generated) * 1000)}


# ---- distributions and filters ----------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.slow
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    logits = np.array([1.0, -0.5, 2.0, 0.0, 0.0, -12.0, 1.5, 0.3], np.float32)
    expected = np.exp(logits.astype(np.float64) / temperature)
    expected /= expected.sum()
    num_draws = 20_000
    sampling = SamplingParams(temperature=temperature)
    counts = Counter(draw(logits, sampling, uniform(11, i)) for i in range(num_draws))
    chi_square = sum(
        (counts[i] - num_draws * p) ** 2 / (num_draws * p)
        for i, p in enumerate(expected)
        if p * num_draws > 5
    )
    assert chi_square < 30, "at most 7 degrees of freedom: beyond the 99.99% quantile"


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5])
def test_quantiles_over_a_large_vocabulary_agree_with_the_fully_sorted_distribution(top_p: float) -> None:
    """Flat and steep rows: the short cuts over few tokens and the whole sort must meet exactly."""
    generator = np.random.default_rng(5)
    for scale in (0.01, 1.0, 4.0, 12.0):
        logits = (generator.standard_normal(5000) * scale).astype(np.float32)
        order = np.lexsort((np.arange(5000), -logits))
        weights = np.exp(logits[order].astype(np.float64) - float(logits.max()))
        cumulative = np.cumsum(weights) / weights.sum()
        num_kept = 5000 if top_p == 1.0 else int(np.searchsorted(cumulative, top_p)) + 1
        for u in generator.random(50):
            place = int(np.searchsorted(cumulative[:num_kept], u * cumulative[num_kept - 1], side="right"))
            assert draw(logits, SamplingParams(top_p=top_p), float(u)) == order[place]


def test_top_k_keeps_the_k_most_likely_tokens() -> None:
    assert kept(SamplingParams(top_k=1)) == [2]
    assert kept(SamplingParams(top_k=3)) == [2, 0, 3]
    assert kept(SamplingParams(top_k=99)) == [2, 0, 3, 1]


def test_top_p_keeps_the_fewest_tokens_that_hold_its_mass() -> None:
    assert kept(SamplingParams(top_p=0.05)) == [2]
    assert kept(SamplingParams(top_p=0.45)) == [2, 0]
    assert kept(SamplingParams(top_p=0.75)) == [2, 0, 3]
    assert kept(SamplingParams(top_p=0.95)) == [2, 0, 3, 1]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    # Of 0.4 + 0.3, the first token holds 57%.
    assert kept(SamplingParams(top_k=2, top_p=0.5)) == [2]
    assert kept(SamplingParams(top_k=2, top_p=0.6)) == [2, 0]


def test_min_p_keeps_tokens_that_are_likely_beside_the_likeliest() -> None:
    assert kept(SamplingParams(min_p=0.8)) == [2]
    assert kept(SamplingParams(min_p=0.7)) == [2, 0]
    assert kept(SamplingParams(min_p=0.2)) == [2, 0, 3, 1]


def test_kept_tokens_are_drawn_in_proportion() -> None:
    tokens = [draw(FOUR, SamplingParams(top_k=2), (i + 0.5) / 700) for i in range(700)]
    assert Counter(tokens) == {2: 400, 0: 300}


def test_equal_logits_go_to_the_lower_token_id_first() -> None:
    flat = np.zeros(6, np.float32)
    assert kept(SamplingParams(), flat) == [0, 1, 2, 3, 4, 5]
    assert kept(SamplingParams(top_k=2), flat) == [0, 1]
    assert sample_one(flat, make_request(SamplingParams(temperature=0.0))) == 0


@given(
    u=st.floats(0, 1, exclude_max=True),
    top_k=st.integers(0, 8),
    top_p=st.floats(1e-9, 1),
    min_p=st.floats(0, 1),
)
def test_any_setting_draws_a_token_that_is_possible(u: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.array([-np.inf, 3.0, -80.0, 2.9, -np.inf], np.float32)
    sampling = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    assert draw(logits, sampling, u) in ({1, 2, 3} if not min_p else {1, 3})


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6, 1e-4])
def test_the_coldest_temperatures_take_the_most_likely_token(temperature: float) -> None:
    request = make_request(SamplingParams(temperature=temperature))
    assert sample_one(FOUR * 5, request) == 2


# ---- penalties ----------------


def greedy_logits_after(sampling: SamplingParams, prompt: list[int], generated: list[int]) -> list[float]:
    row = np.array([2.0, 1.0, -1.0, 0.5], np.float32)
    request = make_request(sampling, prompt, generated)
    assert request.penalties is not None
    request.penalties.apply(row, request.token_ids, request.num_prompt_tokens)
    return row.tolist()


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert greedy_logits_after(sampling, [0, 0, 3], [1, 1, 2]) == [2.0, 0.0, -1.75, 0.5]


def test_repetition_penalty_counts_prompt_and_generated_tokens() -> None:
    sampling = SamplingParams(repetition_penalty=2.0)
    assert greedy_logits_after(sampling, [0, 0], [2]) == [1.0, 1.0, -2.0, 0.5]


def test_logit_bias_is_added() -> None:
    assert greedy_logits_after(SamplingParams(logit_bias={1: -100.0, 3: 1.5}), [0], []) == [
        2.0,
        -99.0,
        -1.0,
        2.0,
    ]


def test_penalties_follow_the_tokens_as_they_come_and_over_many_of_them() -> None:
    request = make_request(SamplingParams(frequency_penalty=1.0))
    assert request.penalties is not None
    for index in range(300):
        row = np.zeros(200, np.float32)
        request.penalties.apply(row, request.token_ids, request.num_prompt_tokens)
        counts = np.bincount(request.token_ids[1:] or [0], minlength=200) if index else np.zeros(200)
        assert (row == -counts).all()
        request.token_ids.append((index * 7) % 150)


def test_stops_are_not_chosen_before_min_tokens() -> None:
    sampling = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(0,))
    eos = frozenset({2})
    assert sample_one(FOUR, make_request(sampling, [1], [3], eos)) == 3
    assert sample_one(FOUR, make_request(sampling, [1], [3, 3], eos)) == 2


# ---- log probabilities ----------------


def test_logprobs_are_the_log_softmax_before_temperature_and_after_penalties() -> None:
    sampling = SamplingParams(temperature=0.0, num_logprobs=2, logit_bias={2: -math.log(2.0)})
    sampled = Sampler().sample(torch.from_numpy(FOUR)[None], [make_request(sampling)])[0]
    assert sampled.token_id == 0
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(math.log(0.3 / 0.8), abs=1e-6)
    assert [token for token, _ in sampled.logprobs.top] == [0, 2]
    assert sampled.logprobs.top[1][1] == pytest.approx(math.log(0.2 / 0.8), abs=1e-6)


def test_top_logprobs_are_ordered_with_ties_to_the_lower_id_and_never_infinite() -> None:
    row = np.array([0.0, 5.0, 0.0, 0.0, -np.inf], np.float32)
    top = token_logprobs(row, 1, 9).top
    assert [token for token, _ in top] == [1, 0, 2, 3, 4]
    assert top[-1][1] == -9999.0
    assert token_logprobs(row, 1, 0).top == []


# ---- what must not matter ----------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_row_gives_the_same_token_whatever_else_is_in_the_batch(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    parameters = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.6, 1.0]),
        top_p=st.sampled_from([1.0, 0.8]),
        top_k=st.sampled_from([0, 10]),
        seed=st.integers(0, 2**32),
        num_logprobs=st.sampled_from([-1, 3]),
        frequency_penalty=st.sampled_from([0.0, 0.4]),
    )
    rows = data.draw(st.lists(parameters, min_size=2, max_size=8))
    logits = torch.from_numpy((generator.standard_normal((len(rows), 300)) * 3).astype(np.float32))
    before = logits.clone()
    together = Sampler().sample(logits, [make_request(sampling, [1, 2], [3, 4]) for sampling in rows])
    for index, sampling in enumerate(rows):
        alone = Sampler().sample(logits[index : index + 1], [make_request(sampling, [1, 2], [3, 4])])
        assert alone[0] == together[index]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_reported_and_the_others_are_sampled(
    bad: float, temperature: float
) -> None:
    logits = torch.from_numpy(np.stack([FOUR, FOUR, FOUR]))
    logits[1, 3] = bad
    requests = [make_request(SamplingParams(temperature=temperature, seed=s)) for s in range(3)]
    results = Sampler().sample(logits, requests)
    assert ["not finite" in result.error for result in results] == [False, True, False]


def test_no_rows_give_no_results() -> None:
    assert Sampler().sample(torch.empty(0, 4), []) == []
