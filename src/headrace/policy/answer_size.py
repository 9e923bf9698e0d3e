"""How long an answer can become, as far as a request's body says so. Pure.

Must not know why that matters: `headrace.gateway.server` does.
"""

from __future__ import annotations

import msgspec

MAX_SHORT_TOKENS = 512
"""Output tokens of all choices. With 230 bytes for a token's frame that is half of what a front lets out on a
shared connection; the other half is for long model names and long tokens."""


class _Fields(msgspec.Struct):
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    prompt: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Fields).decode


def is_short_stream(body: bytes) -> bool:
    """Whether a generation request's whole body asks for a stream that is certainly short.

    Anything unclear is not: no limit, several prompts, logprobs, a body that is not valid.
    """
    try:
        fields = _decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError):
        return False
    limits = [limit for limit in (fields.max_tokens, fields.max_completion_tokens) if limit is not None]
    return (
        fields.stream is True
        and bool(limits)
        and max(limits) * (1 if fields.n is None else fields.n) <= MAX_SHORT_TOKENS
        and min(limits) >= 0
        and (fields.logprobs is None or fields.logprobs is False)
        and bytes(fields.prompt)[:1] != b"["
    )
