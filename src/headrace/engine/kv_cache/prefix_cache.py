"""Finds full KV blocks by the hash of the tokens up to and including them.

Owns which block holds which prefix, and the order in which unreferenced blocks are evicted.
Pure. Must not know reference counts, requests, or what lies in a block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import xxhash

from headrace.engine.kv_cache.kept import KeptBlocks, NothingKept

BlockHash = bytes
_TOKEN_BYTES = 4


def root_hash(cache_salt: str) -> BlockHash:
    """Return the parent hash of a request's first block: only equal salts can share blocks."""
    return xxhash.xxh3_128_digest(b"headrace kv root\0" + cache_salt.encode())


def chain_hashes(parent: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """Return the hash of each full block of `token_ids`; `parent` is the hash of what precedes them.

    A block's hash covers its parent's hash and its own tokens, so it stands for the whole prefix.
    """
    packed = array("i", token_ids).tobytes()  # numpy would take four times as long for a list
    block_bytes = block_size * _TOKEN_BYTES
    hashes = []
    for start in range(0, len(packed) - block_bytes + 1, block_bytes):
        parent = xxhash.xxh3_128_digest(parent + packed[start : start + block_bytes])
        hashes.append(parent)
    return hashes


def extend_hashes(
    hashes: list[BlockHash],
    token_ids: Sequence[int],
    num_blocks: int,
    block_size: int,
    root: BlockHash,
    num_shared_tokens: int = 0,
) -> None:
    """Extend `hashes` to those of the first `num_blocks` full blocks of `token_ids`; they are full.

    `root`: of the request's salt. The full blocks within the first `num_shared_tokens` are hashed without
    salt, so that every request which begins with the same tokens shares them; the salt is mixed in behind
    them.
    """
    num_shared = num_shared_tokens // block_size
    if len(hashes) < min(num_shared, num_blocks):
        parent = hashes[-1] if hashes else root_hash("")
        part = token_ids[len(hashes) * block_size : min(num_shared, num_blocks) * block_size]
        hashes += chain_hashes(parent, part, block_size)
    if len(hashes) < num_blocks:
        parent = hashes[-1] if hashes else root
        if hashes and len(hashes) == num_shared:
            parent = xxhash.xxh3_128_digest(root + parent)
        part = token_ids[len(hashes) * block_size : num_blocks * block_size]
        hashes += chain_hashes(parent, part, block_size)


class PrefixCache:
    """Block hash to block, and back. A block is evictable while no request refers to it."""

    def __init__(self, kept: KeptBlocks | None = None) -> None:
        """Begin with the blocks that `kept` found; it is told of each change."""
        self._kept = kept or NothingKept()
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """Least recently released first."""
        self._forgotten: list[BlockHash] = []
        for block, block_hash in self._kept.found().items():
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._evictable[block] = None

    def __len__(self) -> int:
        """All cached blocks, referenced or not."""
        return len(self._hash_of)

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    def __repr__(self) -> str:
        return f"<PrefixCache {len(self._hash_of)} blocks, {len(self._evictable)} evictable>"

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def is_evictable(self, block: int) -> bool:
        return block in self._evictable

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the block that holds this prefix."""
        return self._block_of.get(block_hash)

    def is_intact(self, block: int) -> bool:
        """False: it was found, unused since, and does not hold what it should."""
        return self._kept.is_intact(block)

    def add(self, block: int, block_hash: BlockHash) -> bool:
        """Make a referenced block findable. False: another block holds the same prefix, nothing changes."""
        if block_hash in self._block_of:
            return False
        assert block not in self._hash_of, f"block {block} is cached under another hash"
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        self._kept.note(block, block_hash)
        return True

    def set_evictable(self, block: int, is_evictable: bool) -> None:
        """Note that a cached block's last reference went, or its first came."""
        if is_evictable:
            self._evictable[block] = None
        else:
            del self._evictable[block]

    def evict(self) -> int:
        """Forget the evictable block that was released longest ago, and return it."""
        block, _ = self._evictable.popitem(last=False)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        self._forgotten.append(block_hash)
        self._kept.forget(block)
        return block

    def forget(self, block: int) -> None:
        """Make a block unfindable (its content is not to be trusted), and not evictable: it is in use, or
        free from now on."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            self._evictable.pop(block, None)
            self._forgotten.append(block_hash)
            self._kept.forget(block)

    def forget_all(self) -> list[int]:
        """Forget every block; all must be evictable. Return them."""
        assert len(self._evictable) == len(self._hash_of), f"cached blocks are in use: {self!r}"
        blocks = list(self._evictable)
        self._forgotten.extend(self._hash_of.values())
        for block in blocks:
            self._kept.forget(block)
        self._block_of.clear()
        self._hash_of.clear()
        self._evictable.clear()
        return blocks

    def take_forgotten(self) -> list[BlockHash]:
        """Return the hashes of the blocks that were evicted or forgotten since the last call: of one step."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def check_integrity(self) -> None:
        """Raise AssertionError if the two directions disagree, or a block is evictable but not cached."""
        back = {block: block_hash for block_hash, block in self._block_of.items()}
        assert back == self._hash_of, (
            f"{len(back)} hashes lead to blocks, {len(self._hash_of)} blocks to hashes"
        )
        strangers = [block for block in self._evictable if block not in self._hash_of]
        assert not strangers, f"evictable but not cached: blocks {strangers[:8]}"
