"""Copies blocks of keys and values out of another engine's memory on this machine (`kv_file`).

The other one may be dead, alive, or anything that a wrong number names: all that is believed is a block
whose prefix is the one that is wanted and whose bytes have the checksum that its record tells. It is read,
never mapped: memory that goes away meanwhile ends a read, not this process. Must not know fronts or torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from headrace.api.messages import KV_MEMORY_NAME, KvPlace
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.engine.kv_cache.prefix_cache import BlockHash
from headrace.engine.kv_file import (
    Checksum,
    KvFile,
    KvLayout,
    read_layout,
    read_records,
)

_MAX_RUN = 64
"""Blocks copied at once: what is read should still be in the processor's cache when it is written."""


def import_prefix(place: KvPlace, hashes: Sequence[BlockHash], pool: BlockPool, own: KvFile) -> int:
    """Copy those blocks of the prefix `hashes` that are there and not here into the pool's cache.

    As many as come one after another, and as the pool has blocks that are not in use. Returns how many.
    """
    cached = pool.find_prefix(hashes)
    missing = hashes[len(cached) :]
    if not missing:
        return 0
    pool.share(cached)  # making room must not cost what comes before
    blocks: list[int] = []
    checksums: list[bytes] = []
    try:
        with Neighbour(place, own.layout) as neighbour:
            found = neighbour.find(missing[: pool.num_allocatable])
            blocks = [pool.allocate() for _ in found]
            checksums = neighbour.copy(found, own, blocks)
    except OSError:
        pass  # the place is gone, or was none
    for block, block_hash, checksum in zip(blocks, missing, checksums, strict=False):
        own.set_copied(block, checksum)
        pool.cache(block, block_hash)
    pool.release([*cached, *blocks])
    return len(checksums)


class FoundBlock(NamedTuple):
    """A block of another engine, as its record tells of it."""

    place: int
    checksum: bytes


class Neighbour:
    """Another engine's memory, open for reading within the block. Raises OSError where there is none."""

    def __init__(self, place: KvPlace, like: KvLayout) -> None:
        """`like`: a layout of the identity that it must have."""
        path = f"/proc/{place.pid}/fd/{place.descriptor}"
        # Opening what is something else might do something, or wait for a disk that does not answer.
        if not os.readlink(path).startswith(f"/memfd:{KV_MEMORY_NAME}"):
            raise FileNotFoundError(f"{path} is no such memory")
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        layout = read_layout(self._descriptor, like)
        if layout is None:
            os.close(self._descriptor)
            raise FileNotFoundError(f"{path} has nothing of this model")
        self._layout = layout
        self._records = self._read_records()

    def __repr__(self) -> str:
        return f"<Neighbour {len(self._records)} blocks of {self._layout.num_blocks} hold something>"

    def __enter__(self) -> Neighbour:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def find(self, hashes: Sequence[BlockHash]) -> list[FoundBlock]:
        """Return the blocks that are said to hold these prefixes, up to the first that none does."""
        found = []
        for block_hash in hashes:
            entry = self._records.get(block_hash)
            if entry is None:
                break
            found.append(entry)
        return found

    def copy(self, found: Sequence[FoundBlock], own: KvFile, blocks: Sequence[int]) -> list[bytes]:
        """Copy blocks into ours. Returns the checksums of the first ones that are what their records said."""
        checksums: list[bytes] = []
        for start, end in _runs([each.place for each in found], blocks):
            try:
                run = self._copy_run(found[start].place, own, blocks[start], end - start)
            except OSError:  # it went away meanwhile
                break
            for entry, checksum in zip(found[start:end], run, strict=True):
                if checksum != entry.checksum:
                    return checksums
                checksums.append(checksum)
        return checksums

    def _copy_run(self, source: int, own: KvFile, block: int, count: int) -> list[bytes]:
        """Copy `count` blocks one after another; return their checksums. Raises OSError."""
        layout, size = self._layout, self._layout.layer_block_bytes
        data = memoryview(bytearray(count * size))
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        sums = [Checksum() for _ in parts]
        for layer in range(layout.num_layers):
            if os.preadv(self._descriptor, [data], layout.place_of(layer, source)) != len(data):
                raise FileNotFoundError("the memory is shorter than it was")
            own.write(layer, block, data)
            for state, part in zip(sums, parts, strict=True):
                state.update(part)
        return [state.digest() for state in sums]

    def _read_records(self) -> dict[BlockHash, FoundBlock]:
        data = os.pread(self._descriptor, self._layout.records_bytes, self._layout.records_start)
        if len(data) < self._layout.records_bytes:  # it went away meanwhile
            return {}
        return {block_hash: FoundBlock(block, told) for block, block_hash, told in read_records(data)}


def _runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return stretches of places, each of at most _MAX_RUN, in which both go on one by one."""
    start = 0
    for index in range(1, len(sources) + 1):
        is_next = (
            index < len(sources)
            and index - start < _MAX_RUN
            and sources[index] == sources[index - 1] + 1
            and targets[index] == targets[index - 1] + 1
        )
        if not is_next:
            yield start, index
            start = index
