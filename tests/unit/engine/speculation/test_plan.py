"""Which guesses of a batch pay: the best ones first, as long as tokens per second rise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.speculation.plan import Offer, choose_numbers


def powers(p: float, number: int) -> list[float]:
    return [p ** (j + 1) for j in range(number)]


def rate(offers: Sequence[Offer], numbers: Sequence[int], step_s: float) -> float:
    pairs = list(zip(offers, numbers, strict=True))
    tokens = len(offers) + sum(sum(offer.probabilities[:number]) for offer, number in pairs)
    return tokens / (step_s + sum(offer.row_s * number for offer, number in pairs))


probabilities = st.lists(st.floats(0.05, 0.99), max_size=3).map(lambda ps: sorted(ps, reverse=True))


@given(
    offers=st.lists(st.builds(Offer, probabilities, st.floats(1e-4, 1e-2)), min_size=1, max_size=3),
    step_s=st.floats(1e-3, 2e-2),
)
def test_no_other_numbers_make_more_tokens_per_second(offers: list[Offer], step_s: float) -> None:
    chosen = choose_numbers(offers, len(offers), step_s)
    all_numbers = product(*(range(len(offer.probabilities) + 1) for offer in offers))
    best = max(rate(offers, numbers, step_s) for numbers in all_numbers)
    assert rate(offers, chosen, step_s) == pytest.approx(best)


def test_a_dearer_row_means_fewer_guesses_and_none_from_one_token_on() -> None:
    costs = (1e-5, 1e-4, 5e-4, 2e-3, 4e-3)
    numbers = [choose_numbers([Offer(powers(0.9, 16), row_s)], 1, 4e-3)[0] for row_s in costs]
    assert numbers == sorted(numbers, reverse=True)
    assert (numbers[0], numbers[-1]) == (16, 0)


def test_rows_of_a_large_batch_must_bring_more_than_those_of_a_single_request() -> None:
    one = Offer(powers(0.6, 7), 4e-4)
    [alone] = choose_numbers([one], 1, 6e-3)
    together = choose_numbers([one] * 16, 16, 12e-3)
    assert alone >= 3
    assert max(together) <= 1


def test_guesses_go_to_those_whose_are_likely() -> None:
    likely, unlikely = Offer(powers(0.95, 7), 5e-4), Offer(powers(0.4, 7), 5e-4)
    assert choose_numbers([unlikely, likely, unlikely, Offer([], 5e-4)], 4, 7e-3) == [0, 7, 0, 0]


def test_rows_that_cost_nothing_are_all_computed_and_none_while_nothing_is_measured() -> None:
    assert choose_numbers([Offer(powers(0.3, 3), 0.0)], 1, 5e-3) == [3]
    assert choose_numbers([Offer(powers(0.3, 3), 1e-3)], 1, 0.0) == [0]
