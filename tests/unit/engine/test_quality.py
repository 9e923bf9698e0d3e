"""The quality gate: what int8 costs in perplexity, on text that is everywhere."""

from __future__ import annotations

import pytest
from benchmarks.quality import measure, prose, sequences

from headrace.engine.operations.kernels import KernelsMissing, load_kernels

MODEL = "smollm2-135m-instruct"
LIMIT = 0.01
"""Relative, and against bfloat16, which auto would take without the kernels."""
AGREEMENT = 0.93
"""Share of places with the same most likely token; 0.96 to 0.97 measured."""


def test_the_prose_is_the_same_every_time_and_long_enough() -> None:
    texts = list(prose())
    assert texts == list(prose())
    assert sum(map(len, texts)) > 20_000


@pytest.mark.slow
def test_int8_keeps_the_perplexity_of_bfloat16() -> None:
    try:
        load_kernels()
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    rounded, found = measure(MODEL, ("bfloat16", "int8"), sequences(MODEL, 3), num_threads=1)
    assert found.path.startswith("int8")
    assert found.perplexity < rounded.perplexity * (1 + LIMIT), f"{rounded}, {found}"
    assert found.agreement > AGREEMENT
