"""The prompt's head: the same prefix gives the same hashes, whatever stands around it; nothing raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.policy.prompt import (
    HEAD_BYTES,
    MAX_SESSION_BYTES,
    PREFIX_BYTES,
    PromptHead,
    prompt_salt,
    read_prompt,
)

LONG = "The quick brown fox jumps over the lazy dog. " * 100


def read(body: Any, salt: str = "", header: str = "", *, is_spaced: bool = False) -> PromptHead:
    separators = (", ", ": ") if is_spaced else (",", ":")
    text = body if isinstance(body, bytes) else json.dumps(body, separators=separators).encode()
    return read_prompt(text[:HEAD_BYTES], len(text), salt, header)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def num_full(num_bytes: int) -> int:
    """How many hashes so long a prompt has."""
    return sum(end <= num_bytes for end in PREFIX_BYTES[1:])


def num_common(a: PromptHead, b: PromptHead) -> int:
    return sum(x == y for x, y in zip(a.hashes, b.hashes))


def test_the_order_of_the_other_fields_does_not_matter() -> None:
    messages = chat(LONG)
    first = read({"model": "m", "messages": messages, "temperature": 0.5})
    last = read({"temperature": 0.5, "model": "m", "stream": True, "messages": messages})
    assert len(first.hashes) >= 10
    assert num_common(first, last) >= len(last.hashes) - 1, "only the block at the end may see other fields"


def test_a_longer_chat_shares_the_blocks_of_the_shorter_one() -> None:
    short = read({"messages": chat(LONG), "model": "m"})
    long = read({"messages": chat(LONG, "and now?", LONG), "model": "m"})
    assert num_common(short, long) >= len(short.hashes) - 1
    assert len(long.hashes) > len(short.hashes)


def test_a_difference_changes_its_block_and_all_behind_it() -> None:
    other = LONG[:1000] + "X" + LONG[1001:]
    a, b = read({"messages": chat(LONG)}), read({"messages": chat(other)})
    assert 3 <= num_common(a, b) <= 4
    assert not set(a.hashes[4:]) & set(b.hashes)


def test_tenants_share_no_hash_and_no_session() -> None:
    body = {"messages": chat(LONG), "user": "u"}
    a, b, again = read(body, "acme"), read(body, "other"), read(body, "acme")
    assert a == again
    assert not set(a.hashes) & set(b.hashes)
    assert a.session != b.session


def test_completions_are_read_too_and_blocks_are_whole() -> None:
    head = read({"model": "m", "prompt": LONG})
    assert len(head.hashes) == num_full(len(json.dumps(LONG)))
    assert head.num_bytes == len(json.dumps(LONG))
    assert read({"model": "m", "prompt": "short"}).hashes == ()


def test_a_body_beyond_the_head_gives_what_fits_and_its_whole_size() -> None:
    head = read({"messages": chat(LONG * 40), "model": "m"})
    assert len(head.hashes) == num_full(HEAD_BYTES - len('{"messages":'))
    assert head.num_bytes > 100_000


def test_words_inside_texts_are_not_taken_for_fields() -> None:
    tricky = 'say "messages": ["x"], "user": "eve", "max_tokens": 7 and "prompt": "y"'
    plain = read({"note": tricky, "messages": chat(LONG)})
    assert num_common(plain, read({"messages": chat(LONG)})) >= 9
    assert (plain.session, plain.max_output_tokens) == ("", 0)
    value = read({"note": "messages", "messages": chat(LONG)})
    assert num_common(value, read({"messages": chat(LONG)})) >= 9


@pytest.mark.parametrize("is_spaced", [False, True])
def test_the_session_is_the_header_else_the_cache_key_else_the_user(is_spaced: bool) -> None:
    body = {"prompt_cache_key": "key", "messages": chat(LONG), "user": "joe"}
    by_header = read(body, header="s1", is_spaced=is_spaced)
    by_key = read(body, is_spaced=is_spaced)
    by_user = read({"messages": chat(LONG), "user": "joe"}, is_spaced=is_spaced)
    assert len({by_header.session, by_key.session, by_user.session}) == 3
    assert read({"prompt": "x", "user": "joe"}).session == by_user.session
    assert read({"messages": chat(LONG)}).session == ""
    assert read({"messages": chat(LONG), "user": 7}).session == ""
    endless = read({"user": "x" * 5000, "messages": chat("y")})
    assert endless.session == read({"user": "x" * MAX_SESSION_BYTES + "z", "messages": []}).session


def test_the_longest_answer_is_found_before_and_behind_the_prompt() -> None:
    assert read({"max_tokens": 64, "messages": chat(LONG)}).max_output_tokens == 64
    assert read({"messages": chat(LONG), "max_completion_tokens": 65}).max_output_tokens == 65
    assert read({"messages": chat(LONG), "max_tokens": None}).max_output_tokens == 0
    assert read(b'{"max_tokens":99999999999999999999999,"prompt":"x"}').max_output_tokens == 999_999_999


@given(st.binary(max_size=2000), st.integers(-(2**63), 2**63), st.text(max_size=20), st.text(max_size=400))
def test_no_bytes_make_it_raise(head: bytes, size: int, salt: str, header: str) -> None:
    prompt = read_prompt(head, size, salt, header)
    assert len(prompt.hashes) <= num_full(len(head))
    assert prompt.num_bytes >= 0


FRAGMENTS = st.sampled_from(
    [
        b'"messages"',
        b'"prompt"',
        b'"user"',
        b'"max_tokens"',
        b":",
        b'"',
        b"\\",
        b" " * 70,
        b"[",
        b"9",
        b"\xff",
        b"{}",
    ]
)


@given(st.lists(FRAGMENTS, max_size=60).map(b"".join))
def test_no_broken_json_makes_it_raise(head: bytes) -> None:
    assert read_prompt(head, len(head), "t") == read_prompt(head, len(head), "t")


@given(st.integers(1, HEAD_BYTES))
def test_what_the_blocks_round_off_is_small_beside_the_prompt(num_bytes: int) -> None:
    lost = num_bytes - PREFIX_BYTES[num_full(num_bytes)]
    assert PREFIX_BYTES[0] == 0
    assert PREFIX_BYTES[-1] == HEAD_BYTES
    assert lost < max(PREFIX_BYTES[1], num_bytes / 3)


def test_what_one_adapter_computed_is_never_taken_for_anothers() -> None:
    body = b'{"prompt": "' + b"once upon a time " * 64 + b'"}'
    salts = [prompt_salt(tenant, adapter) for tenant in ("", "acme") for adapter in ("", "poet", "law")]
    hashes = [read_prompt(body, len(body), salt).hashes for salt in salts]
    assert all(hashes)
    assert len({each for chain in hashes for each in chain}) == sum(map(len, hashes))
    assert prompt_salt("acme") == "acme", "without adapters nothing changes"
