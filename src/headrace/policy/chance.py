"""How likely chance alone makes so many of so many: the exact binomial tail. Pure.

Must not know what is counted, or what follows from it (`rollout`).
"""

from __future__ import annotations

import math

_LEAST_PART = 1e-12
"""Terms below this part of the sum change no verdict."""


def chance_of(num: int, of: int, ratio: float) -> float:
    """Return the chance, 0 to 1, that at least `num` of `of` independent trials come about when each does
    with `ratio`. Where `num` is no more than what is expected, 1 stands for what is about a half or more."""
    if num <= 0 or num <= of * ratio:
        return 1.0
    if num > of or ratio <= 0:
        return 0.0
    # Beyond the expected number every term is smaller than the one before it, so few of them are needed.
    log_ways = math.lgamma(of + 1) - math.lgamma(num + 1) - math.lgamma(of - num + 1)
    term = math.exp(log_ways + num * math.log(ratio) + (of - num) * math.log1p(-ratio))
    total, odds = term, ratio / (1 - ratio)
    for count in range(num, of):
        term *= (of - count) / (count + 1) * odds
        if term <= total * _LEAST_PART:
            break
        total += term
    return min(1.0, total)
