"""How much of prompts a step may compute while streams run beside them.

What is minimised. A step takes s seconds for n streams alone; m prompts wait, W seconds' work in all, of
which a step gets x. Whatever x is, streams lose W seconds and W / x such steps pass. For a small x prompts
wait long for streams, m * s * W / x; for a large one streams become uneven: the square of a step's lateness
is charged, x^2 / s for each stream, a sixth of it, so n * x * W / (6 * s) in all. The sum is least where both
are equal, as in Harris's rule for lots (Factory 10(2), 1913): x = s * sqrt(6 * m / n).

Who was a stream elsewhere, and lost its engine, is late with its next token already: it counts as
RESUMED_WEIGHT prompts, so that a step computes twice as much of one, and comes before new ones.

What is bounded. No stream waits longer for a token than 1 + sqrt(6 * m / n) of its usual steps: 1.9 where one
prompt comes to eight streams. In a burst it is more, as most who wait are prompts: at worst, one stream
beside max_running - 1 prompts, 1 + sqrt(6 * (max_running - 1)), and never more than a step of token_budget
tokens. All as right as the step model is; only LEAST_TOKENS may exceed it.

Pure. Must not know requests or how tokens are chosen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

STREAMS_PER_PROMPT = 6
"""Beside so many streams one prompt makes a step twice as long. By the step model, 4 to 12 take a burst of 32
from 961 to 994 tokens/s, and lengthen the gaps of eight streams by one prompt 1.8 to 2.3 times."""
RESUMED_WEIGHT = 4
"""Its whole gap is lateness. The square of that is charged, too, which beside four to twelve streams makes
steps about twice as long as one new prompt does."""
LEAST_TOKENS = 4
"""A step computes so many however dear they are: one alone would read its prompt's keys for itself."""

Coefficients = tuple[float, float, float, float, float]


class Streams(NamedTuple):
    """What runs and what waits as a step begins."""

    num_decoding: int
    """Requests that compute their last token: the streams."""
    num_kv_tokens: int
    """Tokens in their contexts."""
    num_prompts: int
    """Requests whose prompt the step can go on with or begin."""
    num_before: int
    """Tokens that the first of those has behind it."""
    num_resumed: int = 0
    """How many of them were streams elsewhere."""


def prompt_budget(coefficients: Coefficients, streams: Streams, token_budget: int) -> int:
    """Return how many prompt tokens the next step may compute, at most `token_budget`.

    `coefficients`: of the step model (a, b, q, c, d), in seconds; zeros while nothing is measured. Without
    streams nobody waits for the step.
    """
    a, b, q, c, d = coefficients
    num_decoding, num_kv_tokens, num_prompts, num_before, num_resumed = streams
    token_s = b + q * num_before
    if not num_decoding or token_s <= 0:
        return token_budget
    alone_s = a + c * num_decoding + d * num_kv_tokens
    weight = max(1, num_prompts) + (RESUMED_WEIGHT - 1) * num_resumed
    more_s = alone_s * math.sqrt(STREAMS_PER_PROMPT * weight / num_decoding)
    # Each token also attends to those of the chunk before it: more_s = token_s * P + q * P^2 / 2.
    num_tokens = 2 * more_s / (token_s + math.sqrt(token_s * token_s + 2 * q * more_s))
    return min(token_budget, max(LEAST_TOKENS, int(num_tokens)))
