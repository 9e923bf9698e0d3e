"""How much of prompts a step may compute while streams run beside them: so that no stream waits much longer.

Pure. Must not know requests or how tokens are chosen.
"""

from __future__ import annotations

_STRETCH = 0.8
"""A prompt may lengthen a step by this part of what it takes alone: the gap between two tokens of a stream stays
within twice the usual one, and prompts still get nearly half of the engine's time."""
LEAST_TOKENS = 32
"""Fewer at once would waste the weights that a step reads."""

Coefficients = tuple[float, float, float, float, float]


def prompt_budget(
    coefficients: Coefficients, num_decoding: int, num_kv_tokens: int, num_before: int, token_budget: int
) -> int:
    """Return how many prompt tokens the next step may compute, at most `token_budget`.

    `coefficients`: of the step model (a, b, q, c, d), in seconds; zeros while nothing is measured.
    `num_decoding` streams hold `num_kv_tokens`; the prompt's tokens follow `num_before` others. Without
    streams nobody waits for the step.
    """
    a, b, q, c, d = coefficients
    token_s = b + q * num_before
    if not num_decoding or token_s <= 0:
        return token_budget
    alone_s = a + c * num_decoding + d * num_kv_tokens
    return min(token_budget, max(LEAST_TOKENS, int(_STRETCH * alone_s / token_s)))
