"""vLLM's KV blocks in our words: from the events of its prefix cache to the hashes of blocks that are gone.

vLLM hashes blocks in its own way; its events tell of each block the tokens, the parent and the salt, which
is all that our hash is made of. Format: vLLM's distributed/kv_events.py, in msgpack. Must not know sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.engine.kv_cache.prefix_cache import BlockHash, chain_hashes, root_hash

TheirHash = bytes | int
_MAX_NAMES = 1 << 20
"""Blocks that are known; more than any cache has. At the bound everything counts as forgotten."""


class BlockStored(msgspec.Struct, tag=True):
    """Blocks that are cached now, one after another."""

    block_hashes: list[TheirHash]
    parent_block_hash: TheirHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    extra_keys: list[Sequence[Any] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks whose content is gone."""

    block_hashes: list[TheirHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """The cache is empty."""


class _EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class BlockNames:
    """Our hash of each block that vLLM caches."""

    def __init__(self) -> None:
        self._ours: dict[TheirHash, BlockHash] = {}
        self._decoder = msgspec.msgpack.Decoder(_EventBatch)

    def __len__(self) -> int:
        return len(self._ours)

    def read(self, payload: bytes) -> list[BlockHash]:
        """Take one message of events; return our hashes of the blocks that it says are gone. What cannot be
        read is a change of vLLM's: raises msgspec.DecodeError."""
        gone: list[BlockHash] = []
        for event in self._decoder.decode(payload).events:
            if isinstance(event, AllBlocksCleared):
                gone += self._forget_all()
            elif event.medium not in (None, "GPU", "CPU") or event.group_idx:
                continue  # another tier's copy, or another group's of the same tokens
            elif isinstance(event, BlockStored):
                gone += self._store(event)
            else:
                gone += [name for their in event.block_hashes if (name := self._ours.pop(their, None))]
        return gone

    def _store(self, event: BlockStored) -> list[BlockHash]:
        parent = self._parent_of(event)
        if parent is None:
            return []  # of a block that we never heard of: nobody asks for it either
        names = chain_hashes(parent, event.token_ids, event.block_size)
        self._ours.update(zip(event.block_hashes, names, strict=False))
        return self._forget_all() if len(self._ours) > _MAX_NAMES else []

    def _parent_of(self, event: BlockStored) -> BlockHash | None:
        if event.parent_block_hash is not None:
            return self._ours.get(event.parent_block_hash)
        keys = (event.extra_keys or [None])[0] or ()
        salts = [key for key in keys if isinstance(key, str)]
        return root_hash(salts[-1] if salts else "")

    def _forget_all(self) -> list[BlockHash]:
        names = list(self._ours.values())
        self._ours.clear()
        return names
