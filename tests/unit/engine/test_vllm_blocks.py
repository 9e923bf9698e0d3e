"""From vLLM's cache events to the hashes that the front's digest knows."""

from __future__ import annotations

import msgspec
import pytest

from headrace.engine.kv_cache.prefix_cache import BlockHash, extend_hashes, root_hash
from headrace.engine.vllm_blocks import AllBlocksCleared, BlockNames, BlockRemoved, BlockStored

SIZE = 4
TOKENS = list(range(12))


def message(*events: object) -> bytes:
    """As vLLM's publisher writes a step's events: [time, events, rank], an event a map with its type."""
    return msgspec.msgpack.encode([1.0, list(events), 0])


def ours(token_ids: list[int], salt: str = "") -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, token_ids, len(token_ids) // SIZE, SIZE, root_hash(salt))
    return hashes


def test_blocks_that_go_have_the_hashes_under_which_the_front_knows_them() -> None:
    names = BlockNames()
    first = BlockStored([b"a", b"b"], None, TOKENS[:8], SIZE, "GPU", [("salt",), None])
    assert names.read(message(first, BlockStored([b"c"], b"b", TOKENS[8:], SIZE))) == []
    assert len(names) == 3
    gone = names.read(message(BlockRemoved([b"c", b"unknown"]), BlockRemoved([b"a"])))
    expected = ours(TOKENS, "salt")
    assert gone == [expected[2], expected[0]]
    assert names.read(message(AllBlocksCleared())) == [expected[1]]
    assert len(names) == 0


def test_salts_part_blocks_and_no_salt_is_one_too() -> None:
    names = BlockNames()
    plain = BlockStored([1], None, TOKENS[:4], SIZE)
    salted = BlockStored([2], None, TOKENS[:4], SIZE, extra_keys=[["s"]])
    names.read(message(plain, salted))
    assert names.read(message(BlockRemoved([2, 1]))) == ours(TOKENS[:4], "s") + ours(TOKENS[:4])


def test_copies_elsewhere_and_unknown_parents_are_passed_over() -> None:
    names = BlockNames()
    names.read(message(BlockStored([b"x"], b"never heard of", TOKENS[:4], SIZE)))
    assert len(names) == 0
    names.read(message(BlockStored([b"a"], None, TOKENS[:4], SIZE)))
    assert names.read(message(BlockRemoved([b"a"], "STORAGE"), BlockRemoved([b"a"], group_idx=1))) == []
    assert names.read(message(BlockRemoved([b"a"], "GPU", 0))) == ours(TOKENS[:4])


def test_fields_that_are_not_needed_may_come_and_other_kinds_may_not() -> None:
    names = BlockNames()
    stored = msgspec.to_builtins(BlockStored([b"a"], None, TOKENS[:4], SIZE)) | {"block_hashes": [b"a"]}
    names.read(message({**stored, "lora_id": None, "session_id": "x"}))
    assert len(names) == 1
    with pytest.raises(msgspec.DecodeError):
        names.read(message({"type": "SomethingNew"}))
