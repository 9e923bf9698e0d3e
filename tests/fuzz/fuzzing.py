"""How long a fuzzer runs: one round of fixed examples in CI, rounds of new ones for HEADRACE_FUZZ_SECONDS.

`make fuzz SECONDS=60` sets it. A failure prints the seed of its round; HEADRACE_FUZZ_SEED repeats it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

EXAMPLES_PER_ROUND = 300


def fuzz(target: Callable[..., None], *strategies: SearchStrategy[Any]) -> None:
    """Call `target` with examples until the time is over; at least one round."""
    seconds = float(os.environ.get("HEADRACE_FUZZ_SECONDS", "0"))
    chosen = os.environ.get("HEADRACE_FUZZ_SEED")
    seed = int(chosen) if chosen else secrets.randbits(32) if seconds else 0
    deadline_s = time.monotonic() + seconds
    while True:
        print(f"fuzzing {target.__name__}, seed {seed}")
        run_round(target, strategies, seed)
        seed += 1
        if time.monotonic() >= deadline_s:
            return


def run_round(target: Callable[..., None], strategies: tuple[SearchStrategy[Any], ...], seed: int) -> None:
    settings = hypothesis.settings(
        max_examples=EXAMPLES_PER_ROUND,
        deadline=5000,  # milliseconds: an example that takes so long hangs
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )

    def call(arguments: tuple[Any, ...]) -> None:
        target(*arguments)

    hypothesis.seed(seed)(settings(hypothesis.given(st.tuples(*strategies))(call)))()


@st.composite
def mutations(draw: st.DrawFn, valid: SearchStrategy[bytes]) -> bytes:
    """Valid bytes with a few of them changed, lost, doubled or put in."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 12))
        match draw(st.sampled_from(("change", "cut", "double", "insert", "truncate"))):
            case "change":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[place : place + size]
            case "double":
                data[place:place] = data[place : place + size]
            case "insert":
                data[place:place] = draw(st.binary(max_size=12))
            case "truncate":
                del data[place:]
    return bytes(data)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut bytes at these places, wherever they fall."""
    places = sorted({min(place, len(data)) for place in cuts} | {0, len(data)})
    return [data[begin:end] for begin, end in pairwise(places)]


CUTS = st.lists(st.integers(0, 3000), max_size=10)
