"""Work: what a request costs its endpoint in engine-seconds, expected at binding, measured at its end. Pure.

Owns what one endpoint has learned: the engines' costs per token, bytes per prompt token, usual lengths.
Must not know queues, limits or replicas.
"""

from __future__ import annotations

import math

from headrace.policy.prompt import PromptHead

UNMEASURED_DECODE_TOKEN_S = 2e-6
UNMEASURED_PREFILL_TOKEN_S = 1e-6
"""Until an engine has measured: an output token counts like two prompt tokens, as in Sheng et al. (OSDI 2024,
arXiv:2401.00588). Both are below every real engine, so that what was charged then weighs less, never more,
than what is charged once real seconds are known."""
PREFILL_TO_DECODE = UNMEASURED_PREFILL_TOKEN_S / UNMEASURED_DECODE_TOKEN_S
UNMEASURED_SECOND = 2000 * UNMEASURED_DECODE_TOKEN_S
"""What stands for a second of work until then: about what a small engine's second gives."""
MAX_TOKEN_S = 60.0
"""No engine takes longer per token: a larger cost is nonsense and ignored."""
MAX_TOKENS = 100_000_000
CLOCK_SLACK_S = 1.0
"""A request pays for its first step from where the one before ended, which may be before it arrived."""
COST_MEMORY_S = 10.0
"""Time in which a new cost takes two thirds of an old one's place: so that all kinds of steps count."""
FIRST_BYTES_PER_TOKEN = 4.0
FIRST_OUTPUT_TOKENS = 128.0
FIRST_PROMPT_TOKENS = 256.0
_LEARN = 0.05
"""Weight of one request in a mean over requests."""


class LengthMean:
    """Smoothed number of output tokens; the first observation replaces the guess."""

    __slots__ = ("has_learned", "value")

    def __init__(self, guess: float) -> None:
        self.value = guess
        self.has_learned = False

    def learn(self, value: float) -> None:
        if self.has_learned:
            self.value += (value - self.value) * _LEARN
        else:
            self.value, self.has_learned = float(value), True


class WorkModel:
    """One endpoint's costs and lengths."""

    def __init__(self) -> None:
        self.prefill_token_s = UNMEASURED_PREFILL_TOKEN_S
        self.decode_token_s = UNMEASURED_DECODE_TOKEN_S
        self._observed_s: float | None = None
        self._bytes = FIRST_BYTES_PER_TOKEN
        self._tokens = 1.0
        self.prompt = LengthMean(FIRST_PROMPT_TOKENS)
        self.output = LengthMean(FIRST_OUTPUT_TOKENS)

    def __repr__(self) -> str:
        return f"<WorkModel {self.prefill_token_s:.3g} s in, {self.decode_token_s:.3g} s out>"

    @property
    def is_measured(self) -> bool:
        return self._observed_s is not None

    @property
    def second(self) -> float:
        """How much work is an engine-second."""
        return 1.0 if self.is_measured else UNMEASURED_SECOND

    @property
    def bytes_per_token(self) -> float:
        return self._bytes / self._tokens

    def work(self, num_uncached_tokens: float, num_output_tokens: float) -> float:
        """Return the engine-seconds of so many tokens."""
        return num_uncached_tokens * self.prefill_token_s + num_output_tokens * self.decode_token_s

    def measured(
        self, engine_s: float, total_s: float, num_uncached_tokens: int, num_output_tokens: int
    ) -> float:
        """Return what a request that was open for `total_s` did cost: the engine time measured for it, or,
        where there is none (an engine that does not measure, an end before the first token) or it cannot be
        (an engine does not work longer on a request than that is open), that of its tokens."""
        if self.is_measured and 0 < engine_s <= total_s + CLOCK_SLACK_S:
            return engine_s
        return self.work(num_uncached_tokens, num_output_tokens)

    def observe_costs(self, prefill_token_s: float, decode_token_s: float, now_s: float) -> None:
        """Take what an engine measured per token, smoothed over time and replicas. 0: not measured yet; then
        the other one and the usual ratio say it. What cannot be is ignored."""
        if not (0 <= prefill_token_s <= MAX_TOKEN_S and 0 <= decode_token_s <= MAX_TOKEN_S):
            return  # NaN included
        if prefill_token_s == decode_token_s == 0:
            return
        prefill_token_s = prefill_token_s or decode_token_s * PREFILL_TO_DECODE
        decode_token_s = decode_token_s or prefill_token_s / PREFILL_TO_DECODE
        if self._observed_s is None:
            self.prefill_token_s, self.decode_token_s = prefill_token_s, decode_token_s
        else:
            elapsed_s = min(max(0.0, now_s - self._observed_s), COST_MEMORY_S)  # the clock may jump
            part = 1 - math.exp(-elapsed_s / COST_MEMORY_S)
            self.prefill_token_s += (prefill_token_s - self.prefill_token_s) * part
            self.decode_token_s += (decode_token_s - self.decode_token_s) * part
        self._observed_s = now_s

    def expected_prompt_tokens(self, prompt: PromptHead) -> int:
        """Return the prompt's tokens by its size; the usual number when the size is not known."""
        return round(prompt.num_bytes / self.bytes_per_token if prompt.num_bytes > 0 else self.prompt.value)

    def expected_output_tokens(self, prompt: PromptHead, mean: LengthMean) -> int:
        """Return the usual number of output tokens (`mean`: the tenant's own), at most what is allowed."""
        expected = round(mean.value if mean.has_learned else self.output.value)
        return min(expected, prompt.max_output_tokens) if prompt.max_output_tokens > 0 else expected

    def learn(self, num_bytes: int, num_prompt_tokens: int) -> None:
        """Learn from a finished request how many bytes a prompt token has. Old ones fade: recent bodies and
        chat templates count."""
        self.prompt.learn(num_prompt_tokens)
        if num_bytes > 0 and num_prompt_tokens > 0 and 0.1 <= num_bytes / num_prompt_tokens <= 1000:
            keep = 1 - _LEARN
            self._bytes = self._bytes * keep + num_bytes
            self._tokens = self._tokens * keep + num_prompt_tokens
