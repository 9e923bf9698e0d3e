"""How much of prompts a step computes beside running streams."""

from __future__ import annotations

import pytest

from headrace.engine.prompt_budget import LEAST_TOKENS, prompt_budget

MODEL = (0.004, 0.0002, 1e-8, 0.0003, 1e-7)
BUDGET = 512


@pytest.mark.parametrize(
    ("num_decoding", "num_kv", "num_before"), [(1, 100, 0), (8, 8 * 500, 0), (32, 32 * 500, 1500)]
)
def test_a_prompt_makes_no_step_take_twice_as_long(num_decoding: int, num_kv: int, num_before: int) -> None:
    a, b, q, c, d = MODEL
    alone_s = a + c * num_decoding + d * num_kv
    num_tokens = prompt_budget(MODEL, num_decoding, num_kv, num_before, BUDGET)
    with_prompt_s = alone_s + b * num_tokens + q * num_tokens * (num_before + num_tokens / 2)
    assert with_prompt_s <= 2 * alone_s or num_tokens == LEAST_TOKENS
    assert num_tokens >= LEAST_TOKENS


def test_without_streams_or_measurements_a_prompt_gets_the_whole_step() -> None:
    assert prompt_budget(MODEL, 0, 0, 0, BUDGET) == BUDGET
    assert prompt_budget((0.0,) * 5, 8, 800, 0, BUDGET) == BUDGET


def test_a_prompt_goes_on_however_dear_its_tokens_are_and_within_the_budget() -> None:
    assert prompt_budget((0.001, 1.0, 0.0, 0.0, 0.0), 8, 800, 0, BUDGET) == LEAST_TOKENS
    assert prompt_budget((0.001, 1.0, 0.0, 0.0, 0.0), 8, 800, 0, 16) == 16
    assert prompt_budget((1.0, 1e-9, 0.0, 0.0, 0.0), 8, 800, 0, BUDGET) == BUDGET
