"""How long an answer can become, as far as a request's fields say so. Pure.

Must not know why that matters: `headrace.gateway.server` does.
"""

from __future__ import annotations

from typing import Protocol

MAX_SHORT_TOKENS = 512
"""Output tokens of all choices. With 230 bytes for a token's frame that is half of what a front lets out on a
shared connection; the other half is for long model names and long tokens."""


class AnswerFields(Protocol):
    """The fields of a generation request that bound its answer."""

    stream: bool | None
    max_tokens: int | None
    max_completion_tokens: int | None
    n: int | None
    logprobs: bool | int | None


def is_short_stream(fields: AnswerFields, num_prompts: int) -> bool:
    """Whether a request asks for a stream that is certainly short. Anything unclear is not: no limit, several
    prompts, logprobs."""
    limits = [limit for limit in (fields.max_tokens, fields.max_completion_tokens) if limit is not None]
    return (
        fields.stream is True
        and bool(limits)
        and max(limits) * (1 if fields.n is None else fields.n) <= MAX_SHORT_TOKENS
        and min(limits) >= 0
        and (fields.logprobs is None or fields.logprobs is False)
        and num_prompts == 1
    )
