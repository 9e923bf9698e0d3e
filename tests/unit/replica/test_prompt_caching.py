"""Salts come from tenants, and a declared prefix is found token by token."""

from __future__ import annotations

import logging

import pytest

from headrace.replica.chat import SIMULATED_TEMPLATE, ChatTemplate
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.prompt_caching import PromptCaching, shared_prefix_tokens
from headrace.replica.text_model import PromptEncoder, TextModel
from headrace.replica.tokenizer import ByteTokenizer


def test_a_salt_is_the_tenants_own_and_the_same_on_every_replica() -> None:
    caching, sibling = PromptCaching("chat", PrefixDigest()), PromptCaching("chat", PrefixDigest())
    salts = {tenant: caching.salt_of(tenant) for tenant in ("acme", "other", "", "acme ")}
    assert len(set(salts.values())) == 4
    assert all(salts.values()), "an empty salt would share with the public prefix"
    assert sibling.salt_of("acme") == salts["acme"]
    assert PromptCaching("other", PrefixDigest()).salt_of("acme") != salts["acme"]


def test_an_adapters_salt_is_its_own_for_each_tenant() -> None:
    caching = PromptCaching("chat", PrefixDigest())
    salts = [caching.salt_of(t, adapter) for t in ("", "acme") for adapter in ("", "poet", "law")]
    assert len(set(salts)) == 6


def test_shared_tokens_are_counted_to_the_first_difference() -> None:
    caching = PromptCaching("chat", PrefixDigest(), [1, 2, 3, 4])
    assert [caching.num_shared(tokens) for tokens in ([1, 2, 3, 4, 5], [1, 2], [1, 2, 9, 4], [9, 2])] == [
        4,
        2,
        2,
        0,
    ]
    assert PromptCaching("chat", PrefixDigest()).num_shared([1, 2]) == 0


async def test_the_declared_prefix_is_rendered_as_a_system_message() -> None:
    encoder = PromptEncoder(ByteTokenizer())
    try:
        model = TextModel(ByteTokenizer(), ChatTemplate(SIMULATED_TEMPLATE))
        tokens = await shared_prefix_tokens("Be kind.", model, encoder)
        assert bytes(tokens).startswith(b"system: Be kind.\n")
        assert (
            bytes(await shared_prefix_tokens("Be kind.", TextModel(ByteTokenizer(), None), encoder))
            == b"Be kind."
        )
        assert await shared_prefix_tokens("", model, encoder) == []
    finally:
        encoder.close()


async def test_a_template_that_refuses_it_shares_nothing_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = PromptEncoder(ByteTokenizer())
    try:
        model = TextModel(ByteTokenizer(), ChatTemplate("{{ raise_exception('no system message') }}"))
        with caplog.at_level(logging.WARNING):
            assert await shared_prefix_tokens("Be kind.", model, encoder) == []
        assert "shared_prefix is not shared" in caplog.text
    finally:
        encoder.close()
