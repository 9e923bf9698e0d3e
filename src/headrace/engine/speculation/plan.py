"""Which guesses of a step pay: those with which the batch makes the most tokens per second.

A step of s seconds makes n tokens without guesses. A guess that becomes a token with probability p and
lengthens the step by r seconds raises n / s where p / r is more than that. So take the best ones first, as
long as they raise it: for a ratio of two sums that is the maximum (Dinkelbach, Management Science 13(7),
1967).
Pure. Must not know requests, or where probabilities and costs come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Offer(NamedTuple):
    """What one request could guess."""

    probabilities: Sequence[float]
    """That its j-th guess becomes a token, so that all before it do, too: never rising."""
    row_s: float
    """Seconds by which each guess lengthens the step, >= 0."""


def choose_numbers(offers: Sequence[Offer], num_tokens: float, step_s: float) -> list[int]:
    """Return how many guesses of each offer to make.

    `num_tokens` (> 0): what the step makes without guesses; `step_s`: the seconds it takes then.
    """
    numbers = [0] * len(offers)
    candidates = [
        (probability / row_s if row_s > 0 else float("inf"), probability, row_s, index)
        for index, (probabilities, row_s) in enumerate(offers)
        for probability in probabilities
    ]
    # Stable: among equals a request's earlier guess stays before its later one.
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    for _, probability, row_s, index in candidates:
        if probability * step_s < num_tokens * row_s:
            break
        numbers[index] += 1
        num_tokens += probability
        step_s += row_s
    return numbers
