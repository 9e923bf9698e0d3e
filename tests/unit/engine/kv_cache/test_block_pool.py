"""The block pool and its prefix cache: every block is free, cached or in use, and the sums say so."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.kv_cache.prefix_cache import chain_hashes, root_hash

NUM_BLOCKS = 6


def hashes_of(*tokens: int, salt: str = "") -> list[bytes]:
    return chain_hashes(root_hash(salt), tokens, 2)


def test_a_hash_stands_for_the_whole_prefix_and_the_salt() -> None:
    first = hashes_of(1, 2, 3, 4)
    assert hashes_of(1, 2, 3, 4, 5) == first, "only full blocks have a hash"
    assert hashes_of(1, 2, 9, 4)[0] == first[0]
    assert hashes_of(9, 2, 3, 4)[1] != first[1]
    assert not set(hashes_of(1, 2, 3, 4, salt="acme")) & set(first)
    assert chain_hashes(first[0], [3, 4], 2) == first[1:], "a chain can be continued"


def test_released_cached_blocks_are_found_again_until_they_are_evicted() -> None:
    pool = BlockPool(2)
    table = [pool.allocate(), pool.allocate()]
    hashes = hashes_of(1, 2, 3, 4)
    for block, block_hash in zip(table, hashes):
        pool.cache(block, block_hash)
    pool.release(table)
    assert (pool.num_allocatable, pool.find_prefix(hashes)) == (2, table)
    assert pool.allocate() == table[1], "a prefix is evicted from its end"
    assert pool.find_prefix(hashes) == table[:1]


def test_the_block_released_longest_ago_is_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for index, block in enumerate(blocks):
        pool.cache(block, hashes_of(index, index)[0])
    pool.release([blocks[1]])
    pool.release([blocks[0]])
    pool.share(pool.find_prefix(hashes_of(1, 1)))
    pool.release([blocks[1]])
    assert pool.allocate() == blocks[0]


def test_free_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(3)
    cached, other = pool.allocate(), pool.allocate()
    pool.cache(cached, hashes_of(1, 1)[0])
    pool.release([cached, other])
    assert cached not in [pool.allocate(), pool.allocate()]
    assert pool.allocate() == cached


def test_a_block_with_the_same_prefix_as_a_cached_one_is_not_cached_twice() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    for block in (first, second):
        pool.cache(block, hashes_of(1, 1)[0])
    pool.release([second])
    pool.check_integrity([[first]])
    assert pool.find_prefix(hashes_of(1, 1)) == [first]


def test_distrusted_blocks_are_not_found_unless_others_hold_them_too() -> None:
    pool = BlockPool(3)
    table = [pool.allocate(), pool.allocate()]
    hashes = hashes_of(1, 1, 2, 2)
    for block, block_hash in zip(table, hashes):
        pool.cache(block, block_hash)
    pool.share(table[:1])
    pool.distrust(table)
    pool.release(table)
    assert pool.find_prefix(hashes) == table[:1]
    pool.check_integrity([table[:1]])


def test_the_integrity_check_shows_the_count_that_is_wrong() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    with pytest.raises(AssertionError, match=rf"block {block} has 1 references, the block tables hold 0"):
        pool.check_integrity([])
    pool._free.pop()
    with pytest.raises(AssertionError, match=r"free 1 \+ cached 0 \+ in use 1 = 2, not 3 blocks"):
        pool.check_integrity([[block]])


class PoolMachine(RuleBasedStateMachine):
    """Random use of a pool, against plain lists of what each table holds."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.live: list[list[int]] = []

    @precondition(lambda self: self.pool.num_allocatable > 0)
    @rule(target=tables, data=st.data())
    def allocate(self, data: st.DataObject) -> list[int]:
        size = data.draw(st.integers(1, self.pool.num_allocatable))
        table = [self.pool.allocate() for _ in range(size)]
        assert len(set(table)) == size
        assert not set(table) & {block for other in self.live for block in other}
        self.live.append(table)
        return table

    @rule(table=tables, prefix=st.lists(st.integers(0, 1), min_size=NUM_BLOCKS, max_size=NUM_BLOCKS))
    def cache(self, table: list[int], prefix: list[int]) -> None:
        if any(block in self.pool._cache for block in table):
            return  # A block's content, and so its hash, is set once.
        hashes = chain_hashes(root_hash(""), prefix, 1)
        for block, block_hash in zip(table, hashes):
            self.pool.cache(block, block_hash)

    @rule(target=tables, prefix=st.lists(st.integers(0, 1), min_size=1, max_size=NUM_BLOCKS))
    def share(self, prefix: list[int]) -> list[int]:
        table = self.pool.find_prefix(chain_hashes(root_hash(""), prefix, 1))
        self.pool.share(table)
        self.live.append(table)
        return table

    @rule(table=consumes(tables))
    def release(self, table: list[int]) -> None:
        self.pool.release(table)
        self.live = [other for other in self.live if other is not table]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check_integrity(self.live)
        assert self.pool.num_in_use == len({block for table in self.live for block in table})


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolMachine = pytest.mark.slow(TestPoolMachine)
