"""The native engine's prefix cache towards others: what is shared, what is told, with the fake runner."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.engine.test_native import greedy, make_engine, run_to_end

from headrace.engine.fake_runner import FakeRunner
from headrace.engine.kv_cache.prefix_cache import chain_hashes, root_hash
from headrace.errors import InvalidRequest


def test_a_declared_prefix_is_shared_across_salts_and_what_follows_is_not() -> None:
    runner = FakeRunner(num_blocks=64)
    engine = make_engine(runner)
    prompt = list(range(1, 41))

    def ask(request_id: str, cache_salt: str, num_shared_tokens: int, tokens: list[int] = prompt) -> int:
        request = greedy(request_id, tokens, 4, cache_salt=cache_salt)
        request = msgspec.structs.replace(request, num_shared_tokens=num_shared_tokens)
        outcome = run_to_end(engine, request)[request_id]
        alone = run_to_end(make_engine(FakeRunner(num_blocks=64)), request)[request_id]
        assert outcome.token_ids == alone.token_ids
        return outcome.cached[0]

    assert ask("a", "acme", 20) == 0
    assert ask("b", "other", 20) == 16, "two full blocks of eight are public"
    assert ask("c", "third", 0) == 0, "who does not declare it shares nothing"
    assert ask("d", "acme", 20) == 32
    assert ask("e", "other", 20, [*prompt[:20], 9, *prompt[21:]]) == 16


def test_a_declared_prefix_longer_than_the_prompt_is_refused() -> None:
    engine = make_engine(FakeRunner(num_blocks=64))
    for num_shared in (-1, 5):
        request = msgspec.structs.replace(greedy("r", [1, 2, 3, 4], 4), num_shared_tokens=num_shared)
        with pytest.raises(InvalidRequest, match="must be 0 to 4"):
            engine.submit(request)


def test_every_evicted_block_is_told_once_and_uncomputed_prompts_are_counted() -> None:
    engine = make_engine(FakeRunner(num_blocks=8), token_budget=16)
    evicted: list[bytes] = []
    for number in range(6):
        engine.submit(greedy(f"r{number}", [number + 1] * 40, 2))
        assert engine.load().num_uncomputed_tokens == 40
        batch = engine.step()
        assert batch.load.num_uncomputed_tokens == 24
        evicted += batch.evicted
        while engine.has_work():
            evicted += engine.step().evicted
            engine.check_integrity()
    assert engine.load().num_uncomputed_tokens == 0
    assert len(set(evicted)) == len(evicted) > 0
    known = chain_hashes(root_hash(""), [1] * 40, 8)
    assert set(known) <= set(evicted), "the oldest prompt is gone entirely"


def test_blocks_that_are_not_trusted_are_told_as_evicted() -> None:
    runner = FakeRunner(num_blocks=32)
    runner.poison_token = 13
    engine = make_engine(runner)
    engine.submit(greedy("r", [*range(14, 40), 13], 4))
    told: list[bytes] = []
    while engine.has_work():
        told += engine.step().evicted
    assert set(told) == set(chain_hashes(root_hash(""), [*range(14, 40)], 8))
