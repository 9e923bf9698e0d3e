"""The digest: what is announced is cached, what is evicted is withdrawn; listeners hear it in their pace."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams, StepBatch, StepOutput
from headrace.clock import VirtualClock
from headrace.engine.simulated import KV_BYTES_PER_TOKEN, SimulatedEngine
from headrace.policy.prefix_index import PrefixIndex
from headrace.policy.prompt import PREFIX_BYTES, read_prompt
from headrace.replica import prefix_digest
from headrace.replica.prefix_digest import PrefixDigest

WORDS = "the channel that brings water to the turbines is full of clear and cold water "


class World:
    """A digest beside a simulated engine with a small cache, and a router's index that follows the news."""

    def __init__(self, kv_tokens: int = 2048) -> None:
        clock = VirtualClock()
        spec = EngineSpec("simulated", "s", kv_cache_bytes=kv_tokens * KV_BYTES_PER_TOKEN,
                          simulated_prefill_token_s=1e-5)  # fmt: skip
        self.engine = SimulatedEngine(spec, clock, clock.advance)
        self.digest = PrefixDigest()
        self.digest.on_ready(spec.block_size)
        self.feed = self.digest.subscribe()
        self.index = PrefixIndex()
        self.count = 0

    def ask(self, text: str, tenant: str = "") -> int:
        """Serve one request to its end; return its cached tokens."""
        self.count += 1
        body = self.body(text)
        request = GenerationRequest(
            f"r{self.count}",
            list(text.encode()),
            SamplingParams(max_tokens=3),
            tenant=tenant,
            cache_salt=tenant,
        )
        self.engine.submit(request)
        self.digest.admit(request, body)
        cached = 0
        while self.engine.has_work():
            batch = self.engine.step()
            self.digest.on_step(batch)
            self.digest.check_integrity()
            cached += sum(output.num_cached_tokens for output in batch.outputs)
        return cached

    def body(self, text: str) -> bytes:
        return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()

    def num_known(self, text: str, tenant: str = "") -> int:
        """Leading blocks of a prompt that the router believes to be cached."""
        news = self.feed.take()
        self.index.report("r", news.epoch, news.added, news.removed)
        body = self.body(text)
        return self.index.match(read_prompt(body, len(body), tenant).hashes, 0.0).get("r", 0)


def test_a_computed_prompt_is_announced_and_withdrawn_when_its_blocks_are_evicted() -> None:
    world = World()
    text = WORDS * 12
    assert world.num_known(text) == 0
    world.ask(text)
    assert world.num_known(text) == 3
    for number in range(4):
        world.ask(f"{number} something else " + WORDS * 10)
    assert world.num_known(text) == 0
    assert world.ask(text) == 0, "the engine has forgotten it, too"


def test_what_the_router_believes_is_what_the_engine_spares() -> None:
    world = World(kv_tokens=8192)
    shared = WORDS * 20
    world.ask(shared + "first question")
    blocks = world.num_known(shared + "a second one, of another kind")
    assert blocks >= 5
    assert world.ask(shared + "a second one, of another kind") >= PREFIX_BYTES[5] - 16


def test_nothing_is_announced_before_the_prompt_is_computed_nor_for_a_refused_or_aborted_one() -> None:
    digest = PrefixDigest()
    digest.on_ready(16)
    body = World().body(WORDS * 10)
    for request_id in ("pending", "refused", "aborted"):
        digest.admit(GenerationRequest(request_id, list(range(200)), SamplingParams()), body)
    digest.on_step(StepBatch([StepOutput("refused", finish_reason="error", error="no")], None))  # type: ignore[arg-type]
    digest.on_abort("aborted")
    assert len(digest) == 0
    digest.on_step(StepBatch([StepOutput(name, [1]) for name in ("pending", "refused", "aborted")], None))  # type: ignore[arg-type]
    assert len(digest) == 3


def test_tenants_prompts_are_announced_apart() -> None:
    world = World()
    world.ask(WORDS * 12, "acme")
    assert world.num_known(WORDS * 12, "acme") == 3
    assert world.num_known(WORDS * 12, "other") == 0


def test_a_lost_engine_begins_another_epoch() -> None:
    world = World()
    world.ask(WORDS * 12)
    before = world.feed.take()
    world.digest.on_lost()
    after = world.feed.take()
    assert before.added
    assert (after.epoch, after.added) == (before.epoch + 1, [])


def test_a_listener_that_does_not_read_is_told_everything_anew(monkeypatch: Any) -> None:
    monkeypatch.setattr(prefix_digest, "MAX_CHANGES", 10)
    world = World(kv_tokens=32_768)
    first = world.feed.take()
    for number in range(6):
        world.ask(f"{number} " + WORDS * 12)
    news = world.feed.take()
    assert news.epoch == first.epoch + 1
    assert len(news.added) == len(world.digest) == 18
    assert world.feed.take() == (news.epoch, [], [])


def test_many_changes_come_over_several_reports_and_the_first_lists_the_newest(monkeypatch: Any) -> None:
    monkeypatch.setattr(prefix_digest, "MAX_PER_REPORT", 4)
    monkeypatch.setattr(prefix_digest, "MAX_LISTED", 5)
    world = World(kv_tokens=32_768)
    world.feed.take()
    for number in range(3):
        world.ask(f"{number} " + WORDS * 12)
    told = [world.feed.take() for _ in range(4)]
    assert [len(news.added) for news in told] == [4, 4, 1, 0]
    late = world.digest.subscribe().take()
    assert late.added == [*told[1].added, *told[2].added]


def test_hashes_are_bounded_and_the_oldest_is_withdrawn() -> None:
    digest = PrefixDigest(max_hashes=5)
    digest.on_ready(16)
    feed = digest.subscribe()
    feed.take()
    for number in range(4):
        body = World().body(f"{number} " + WORDS * 12)
        digest.admit(GenerationRequest(f"r{number}", [number] * 500, SamplingParams()), body)
        digest.on_step(StepBatch([StepOutput(f"r{number}", [1])], None))  # type: ignore[arg-type]
        digest.check_integrity()
    assert len(digest) == 5
    assert len(feed.take().removed) == 7


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.sampled_from("ab")), max_size=12))
def test_the_router_never_believes_in_much_more_than_is_cached(asked: list[tuple[int, int, str]]) -> None:
    world = World(kv_tokens=3072)
    for prefix, tail, tenant in asked:
        text = f"{prefix} " + WORDS * 10 + f"{tail} " + "tail " * tail
        believed = PREFIX_BYTES[world.num_known(text, tenant)]
        assert world.ask(text, tenant) >= believed - 2 * PREFIX_BYTES[1]
