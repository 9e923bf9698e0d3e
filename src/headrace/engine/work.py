"""Work accounting: whose engine time a step was. Busy and idle time add up to all time.

An engine is busy while it has requests; its time up to the end of a step is split over that step's requests,
by what the step model says that each of their parts costs, to the nanosecond. So `busy_ns` is the sum of all
shares ever given. Owns the step model's fit, which takes the same times. Pure: time is passed in.
Must not know what a request is, or where its shares are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headrace.engine.step_model import StepContents, StepModelFit

_WEIGHT_SCALE = float(1 << 46)
_UNMEASURED = (1.0, 1.0, 0.0, 2.0, 0.0)
"""Weights while nothing is measured: a decoded token as two prompt tokens, as in `policy.work`."""


def prompt_part(num_tokens: int, num_before: int) -> StepContents:
    """Return what `num_tokens` prompt tokens (>= 1) that follow `num_before` others bring into a step."""
    return StepContents(num_tokens, num_tokens * num_before + num_tokens * (num_tokens + 1) // 2)


def decode_part(num_tokens: int, num_context: int) -> StepContents:
    """Return what a decoding request brings: `num_tokens` tokens (guessed ones included), and `num_context`
    in its context after the step. Keys are read once; each guess attends to them besides."""
    num_guesses = num_tokens - 1
    num_attended = num_guesses * num_context - num_guesses * (num_guesses - 1) // 2
    return StepContents(0, 0, num_tokens, num_context, num_attended)


def split(total_ns: int, weights: Sequence[float]) -> list[int]:
    """Return `total_ns` (>= 0) in parts proportional to `weights`, by largest remainder: they sum exactly.

    Ties go to the earlier part. Weights that are negative or not finite count as 0; if none counts, all parts
    are alike. `weights` must not be empty.
    """
    whole_weight = sum(weights)
    if not (0 < whole_weight < math.inf and min(weights) >= 0):
        weights = [weight if 0 < weight < math.inf else 0.0 for weight in weights]
        largest = max(weights) or 1.0
        weights = [weight / largest for weight in weights]
        whole_weight = sum(weights)
    scale = _WEIGHT_SCALE / whole_weight if whole_weight else 0.0
    scaled = [int(weight * scale) for weight in weights] if scale < math.inf else [0]
    whole = sum(scaled)
    if not whole:
        scaled, whole = [1] * len(weights), len(weights)
    products = [total_ns * weight for weight in scaled]
    parts = [product // whole for product in products]
    missing = total_ns - sum(parts)
    if missing:
        remainders = [product % whole for product in products]
        for index in sorted(range(len(parts)), key=remainders.__getitem__, reverse=True)[:missing]:
            parts[index] += 1
    return parts


class WorkAccount:
    """One engine's time since it was ready. Times are monotonic nanoseconds; one that goes back counts as
    standing still."""

    def __init__(self, ready_ns: int) -> None:
        self.fit = StepModelFit()
        self.busy_ns = 0
        self.idle_ns = 0
        self._until_ns = ready_ns
        """All time up to here is accounted for."""

    def __repr__(self) -> str:
        return f"<WorkAccount {self.busy_ns / 1e9:.3f} s busy, {self.idle_ns / 1e9:.3f} s idle, {self.fit!r}>"

    def rest(self, now_ns: int) -> None:
        """The engine had nothing to do until now."""
        self.idle_ns += self._pass(now_ns)

    def end_step(self, now_ns: int, parts: Sequence[StepContents]) -> list[int]:
        """A step ended: return each part's share of the time since the last one, or since work came."""
        elapsed_ns = self._pass(now_ns)
        self.busy_ns += elapsed_ns
        shares = split(elapsed_ns, self._weights(parts))
        self.fit.observe(elapsed_ns * 1e-9, StepContents._make(map(sum, zip(*parts))))
        return shares

    def _pass(self, now_ns: int) -> int:
        elapsed_ns = max(0, now_ns - self._until_ns)
        self._until_ns += elapsed_ns
        return elapsed_ns

    def _weights(self, parts: Sequence[StepContents]) -> list[float]:
        coefficients = self.fit.coefficients
        a, b, q, c, d = coefficients if any(coefficients) else _UNMEASURED
        fixed = a / len(parts)
        return [
            fixed + b * num_prompt + q * (num_attended + num_guessing) + c * num_decoded + d * num_kv
            for num_prompt, num_attended, num_decoded, num_kv, num_guessing in parts
        ]
