"""What the router may know of a prompt: chained hashes of its head, its size, its session. Pure.

The front computes the same hashes over the same bytes, so that its reports and the router's index speak of
the same prefixes. The head may be cut off anywhere and need not be JSON at all: nothing here raises.
Must not know tokens, tokenizers or replicas.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import msgspec
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from headrace.policy.answer_size import is_short_stream

HEAD_BYTES = 16_384
"""The part of a body that is looked at. Longer prompts of one session are known by the session."""
PREFIX_BYTES = tuple(accumulate((0, *[256] * 4, *[512] * 6, *[1024] * 12)))
"""How many bytes of the prompt its first hashes stand for: of none, of one, of two, ... Blocks grow with what
is before them, since what they round off is to be small beside it: 256 bytes are about 64 tokens of English,
four KV blocks. A 4 kB prompt has 9 hashes in place of 15, one of 16 kB 22 in place of 64: each costs the
router time when it is hashed, matched, expected, reported and withdrawn."""
_BLOCKS = tuple(pairwise(PREFIX_BYTES))
MAX_SESSION_BYTES = 256
_TAIL_BYTES = 2048
"""Fields behind the prompt are looked for in this many last bytes: searching the whole prompt for fields that
are not there would cost as much as hashing it."""
_MAX_DIGITS = 9
_MAX_SPACES = 64
_SPACE = b" \t\r\n"


class PromptHead(msgspec.Struct, frozen=True, gc=False):
    """One request's prompt as far as the router sees it."""

    hashes: tuple[int, ...] = ()
    """64-bit hash of each full block of the prompt's head and all before it, tenant's salt included."""
    num_bytes: int = 0
    """Size of the prompt, about: the body's size from the prompt's beginning."""
    session: str = ""
    """Who asked before may be served where the context is. Empty: unknown."""
    max_output_tokens: int = 0
    """What the request allows, as far as the head says so; 0: unknown."""
    is_short_stream: bool = False
    """The whole body was seen, and it asks for a stream that is certainly short (`policy.answer_size`)."""
    is_stream: bool = False
    """It asks for a stream, as far as the head says so."""


class _Body(msgspec.Struct):
    """A generation request's fields that matter here."""

    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


_decode = msgspec.json.Decoder(_Body).decode


def read_prompt(head: bytes, body_bytes: int, salt: str, session_header: str = "") -> PromptHead:
    """Read the first bytes of a generation request's body; at most HEAD_BYTES count.

    `salt`: `prompt_salt`; hashes and sessions of different salts never meet. `session_header`: x-session-id,
    which goes before the body's `prompt_cache_key` and `user`.
    """
    root = xxh3_64_intdigest(b"headrace prompt\0" + salt.encode("utf-8", "surrogatepass"))
    session = session_header[:MAX_SESSION_BYTES].encode("utf-8", "replace")
    if len(head) == body_bytes and body_bytes <= HEAD_BYTES:
        try:
            body = _decode(head)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError):
            pass  # the front will say what is wrong with it
        else:
            return _read_body(body, root, session)
    return _read_head(head[:HEAD_BYTES], body_bytes, root, session)


def prompt_salt(tenant: str, adapter: str = "") -> str:
    """Return the salt of a request's prompt: what one adapter computed of it is of no use to another."""
    return f"{tenant}\0{adapter}" if adapter else tenant


def _read_body(body: _Body, root: int, session: bytes) -> PromptHead:
    """Read a body that was seen whole."""
    prompt = bytes(body.messages or body.prompt)
    if not session:
        session = (body.prompt_cache_key or body.user or "").encode("utf-8", "replace")[:MAX_SESSION_BYTES]
    return PromptHead(
        chain_blocks(root, prompt, 0),
        len(prompt),
        xxh3_64_hexdigest(session, root) if session else "",
        min(max(0, body.max_tokens or body.max_completion_tokens or 0), 10**_MAX_DIGITS - 1),
        is_short_stream(body, 2 if bytes(body.prompt).startswith(b"[") else 1),
        body.stream is True,
    )


def _read_head(head: bytes, body_bytes: int, root: int, session: bytes) -> PromptHead:
    """Read what is known of a body that goes on, or that is not valid."""
    start = _find_value(head, b'"messages"')
    if start < 0:
        start = _find_value(head, b'"prompt"')
    rest = head if start < 0 else head[:start] + head[max(start, len(head) - _TAIL_BYTES) :]
    if not session:
        session = _find_text(rest, b'"prompt_cache_key"') or _find_text(rest, b'"user"')
    return PromptHead(
        () if start < 0 else chain_blocks(root, head, start),
        max(0, body_bytes - max(start, 0)),
        xxh3_64_hexdigest(session, root) if session else "",
        _find_number(rest, b'"max_tokens"') or _find_number(rest, b'"max_completion_tokens"'),
        is_stream=_find_true(rest, b'"stream"'),
    )


def chain_blocks(root: int, head: bytes, start: int) -> tuple[int, ...]:
    """Return the hash of each full block of `head` from `start`: of its bytes, seeded with the one before."""
    digest = xxh3_64_intdigest
    num_bytes = len(head) - start
    hashes = []
    for begin, end in _BLOCKS:
        if end > num_bytes:
            break
        root = digest(head[start + begin : start + end], root)
        hashes.append(root)
    return tuple(hashes)


def _find_value(head: bytes, key: bytes) -> int:
    """Return where the value of `key`, in its quotes, begins; -1 if it is not there.

    Inside a JSON string the key's quotes would be escaped, so they do not match. The same text as a value
    has no colon behind it. A key of the same name deeper in the tree is taken, too, if it comes first: that
    costs affinity and nothing else.
    """
    at = head.find(key)
    for _ in range(4):
        if at < 0:
            return -1
        after = at + len(key)
        if head[after : after + 1] != b":":
            after = _skip_space(head, after)
        if head[after : after + 1] == b":":
            after += 1
            return after if head[after : after + 1] in b'["' else _skip_space(head, after)
        at = head.find(key, after)
    return -1


def _skip_space(head: bytes, at: int) -> int:
    """Skip at most _MAX_SPACES: a head full of spaces must cost nothing."""
    end = min(len(head), at + _MAX_SPACES)
    while at < end and head[at] in _SPACE:
        at += 1
    return at


def _find_text(head: bytes, key: bytes) -> bytes:
    at = _find_value(head, key)
    if at < 0 or head[at : at + 1] != b'"':
        return b""
    end = head.find(b'"', at + 1, at + 1 + MAX_SESSION_BYTES)
    return head[at + 1 : end] if end >= 0 else head[at + 1 : at + 1 + MAX_SESSION_BYTES]


def _find_true(head: bytes, key: bytes) -> bool:
    at = _find_value(head, key)
    return at >= 0 and head.startswith(b"true", at)


def _find_number(head: bytes, key: bytes) -> int:
    at = _find_value(head, key)
    if at < 0:
        return 0
    end = at
    while end - at < _MAX_DIGITS and head[end : end + 1].isdigit():
        end += 1
    return int(head[at:end]) if end > at else 0
