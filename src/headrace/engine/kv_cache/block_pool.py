"""All KV blocks of an engine: which are free, cached, or in use, and by how many requests.

Owns reference counts and the choice of the next block. Invariant: free + cached + in use = total.
Pure. Must not know tensors, tokens or requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from headrace.engine.kv_cache.kept import KeptBlocks
from headrace.engine.kv_cache.prefix_cache import BlockHash, PrefixCache


class BlockPool:
    """Hands out blocks. Free blocks go first, then the cached ones that were released longest ago."""

    def __init__(self, num_blocks: int, kept: KeptBlocks | None = None) -> None:
        """`kept`: what hears of each cached block. What it found is cached from the beginning."""
        assert num_blocks >= 1, f"a block pool needs blocks, got {num_blocks}"
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._cache = PrefixCache(kept)
        self._free = [block for block in range(num_blocks - 1, -1, -1) if block not in self._cache]

    def __repr__(self) -> str:
        return (
            f"<BlockPool {self.num_in_use} in use, {self._cache.num_evictable} cached, "
            f"{len(self._free)} free of {self.num_blocks}>"
        )

    @property
    def num_allocatable(self) -> int:
        """Free or cached: what allocate() can give."""
        return len(self._free) + self._cache.num_evictable

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - self.num_allocatable

    def allocate(self) -> int:
        """Return a block with one reference; its old content is forgotten. Needs num_allocatable >= 1."""
        block = self._free.pop() if self._free else self._cache.evict()
        self._references[block] = 1
        return block

    def find_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the blocks of the longest cached prefix of `hashes`, without taking references."""
        blocks = []
        for block_hash in hashes:
            block = self._cache.find(block_hash)
            if block is None:
                break
            if not self._cache.is_intact(block):
                self._cache.forget(block)
                self._free.append(block)
                break
            blocks.append(block)
        return blocks

    def count_evictable(self, blocks: Iterable[int]) -> int:
        """How many of these would leave num_allocatable if they were shared."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference on each of these cached blocks."""
        for block in blocks:
            if self._references[block] == 0:
                self._cache.set_evictable(block, False)
            self._references[block] += 1

    def cache(self, block: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable by its hash, unless another block is already."""
        assert self._references[block] > 0, f"block {block} is cached without being in use"
        self._cache.add(block, block_hash)

    def release(self, table: Sequence[int]) -> None:
        """Give back one reference on each block of a block table.

        The last block goes first: a long prefix is evicted from its end, so that its beginning stays of use.
        """
        for block in reversed(table):
            count = self._references[block] = self._references[block] - 1
            assert count >= 0, f"block {block} was released more often than taken"
            if count == 0:
                if block in self._cache:
                    self._cache.set_evictable(block, True)
                else:
                    self._free.append(block)

    def distrust(self, table: Sequence[int]) -> None:
        """Make blocks that only this table refers to unfindable: their content may be damaged."""
        for block in table:
            if self._references[block] == 1:
                self._cache.forget(block)

    def forget_all(self) -> None:
        """Make every cached block free: the memory behind them goes. None may be in use."""
        assert self.num_in_use == 0, f"blocks are in use: {self!r}"
        self._free.extend(self._cache.forget_all())

    def take_forgotten(self) -> list[BlockHash]:
        """Return the hashes of the blocks whose content was forgotten since the last call."""
        return self._cache.take_forgotten()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError, showing the sum that failed, unless `tables` explain every reference."""
        expected = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._references):
            assert count == expected[block], (
                f"block {block} has {count} references, the block tables hold {expected[block]}"
            )
        num_in_use = len(expected)
        num_free, num_cached = len(self._free), self._cache.num_evictable
        assert num_free + num_cached + num_in_use == self.num_blocks, (
            f"free {num_free} + cached {num_cached} + in use {num_in_use} "
            f"= {num_free + num_cached + num_in_use}, not {self.num_blocks} blocks"
        )
        wrong = [b for b in self._free if self._references[b] or b in self._cache]
        assert not wrong, f"free, but referenced or cached: blocks {wrong[:8]}"
        assert len(set(self._free)) == num_free, f"{num_free} free, {len(set(self._free))} of them distinct"
        referenced = [b for b in expected if self._cache.is_evictable(b)]
        assert not referenced, f"in use and evictable at once: blocks {referenced[:8]}"
        self._cache.check_integrity()
