"""Keys and values in memory that outlives the engine: a file without a name, which the front holds open.

An engine that is killed leaves what it computed behind. The next one of the same front begins with it, and
siblings on the same machine copy out of it what they continue (`kv_import`): a stream's prompt is not
computed again. Owns the file's layout, and what is believed of it. Must not know requests, torch or fronts.

Layout, little-endian, each part from a page on: a header (magic, identity, number of blocks); a record per
block (hash of the tokens up to and including it, checksum of its bytes; zeros: nothing is said of it); per
layer all its blocks. A block's bytes are written before its record, and its record is cleared before its
bytes change, so a process that ends anywhere leaves no record that lies; what a reader meets while it
changes, and what a broken process wrote where it should not have, has another checksum.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from headrace.engine.kv_cache.prefix_cache import BlockHash
from headrace.units import PAGE_BYTES, whole_pages

_MAGIC = b"hdrckv01"
_HEADER = struct.Struct("<8s16sQ")
_RECORD = struct.Struct("<16s8s")
"""Hash of the prefix, checksum of the block's bytes."""
_NO_RECORD = bytes(_RECORD.size)
Checksum = xxhash.xxh3_64


def identity_of(traits: Sequence[Any]) -> bytes:
    """Return 16 bytes that stand for everything that decides what a block's bytes mean: model files,
    arithmetic, sizes. Engines of one identity can read each other's blocks."""
    return xxhash.xxh3_128_digest(json.dumps(traits, sort_keys=True, default=str).encode())


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Where everything lies in a file of so many blocks."""

    identity: bytes
    num_blocks: int
    num_layers: int
    layer_block_bytes: int
    """Keys and values of one block in one layer."""

    @property
    def records_start(self) -> int:
        return PAGE_BYTES

    @property
    def layer_bytes(self) -> int:
        """Of one layer, up to the next one."""
        return whole_pages(self.num_blocks * self.layer_block_bytes)

    @property
    def records_bytes(self) -> int:
        return self.num_blocks * _RECORD.size

    @property
    def layers_start(self) -> int:
        return self.records_start + whole_pages(self.records_bytes)

    @property
    def num_bytes(self) -> int:
        return self.layers_start + self.num_layers * self.layer_bytes

    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, self.identity, self.num_blocks)

    def place_of(self, layer: int, block: int) -> int:
        """Where a block's bytes of one layer begin."""
        return self.layers_start + layer * self.layer_bytes + block * self.layer_block_bytes


def read_layout(descriptor: int, like: KvLayout) -> KvLayout | None:
    """Return the layout of a file, which is `like` but for its number of blocks; None: it is another model's,
    or not as long as its header says. Raises OSError."""
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    magic, identity, num_blocks = _HEADER.unpack(header)
    if (magic, identity) != (_MAGIC, like.identity):
        return None
    layout = replace(like, num_blocks=num_blocks)
    return layout if os.fstat(descriptor).st_size == layout.num_bytes else None


def read_records(data: bytes | memoryview) -> Iterator[tuple[int, BlockHash, bytes]]:
    """Return block, prefix hash and checksum of each record that says something."""
    for block, (block_hash, told) in enumerate(_RECORD.iter_unpack(data)):
        if block_hash + told != _NO_RECORD:
            yield block, block_hash, told


def held_bytes(descriptor: int) -> int:
    """Return the memory that a file takes already; of none (negative): 0."""
    return os.fstat(descriptor).st_blocks * 512 if descriptor >= 0 else 0


class KvFile:
    """An engine's own file. One caller, one thread."""

    def __init__(self, descriptor: int, layout: KvLayout) -> None:
        """Take what an engine of the same layout left there, or begin anew. Raises MemoryError."""
        self.layout = layout
        self._descriptor = descriptor
        self._layer_starts = [layout.place_of(layer, 0) for layer in range(layout.num_layers)]
        self._unchecked: dict[int, bytes] = {}
        """Blocks that were found, with their checksums, until their first use."""
        self._copied: dict[int, bytes] = {}
        """Checksums of blocks that were copied, until they are noted."""
        self._found: dict[int, BlockHash] = {}
        self._view: memoryview | None = None
        is_left = read_layout(descriptor, layout) == layout
        if not is_left:
            os.ftruncate(descriptor, 0)
        self.open()
        if is_left:
            self._find_blocks()

    def __repr__(self) -> str:
        return f"<KvFile {self.layout.num_blocks} blocks, {len(self._found)} of them found>"

    # ---- the memory

    def open(self) -> None:
        """Have the memory: zeros, or what is there. Raises MemoryError."""
        layout = self.layout
        try:
            os.ftruncate(self._descriptor, layout.num_bytes)
            memory = mmap.mmap(self._descriptor, layout.num_bytes, flags=mmap.MAP_SHARED)
        except OSError as error:
            raise MemoryError(f"{layout.num_bytes} bytes: {error.strerror or error}") from None
        self._view = memoryview(memory)
        self._view[: _HEADER.size] = layout.header()

    def close(self) -> None:
        """Give the memory back to the system, and with it all content. `layer`'s views must be unused."""
        self._view = None
        self._found, self._unchecked, self._copied = {}, {}, {}
        os.ftruncate(self._descriptor, 0)

    def layer(self, index: int) -> memoryview:
        """All blocks of one layer, one after another; valid until `close`."""
        assert self._view is not None, "the memory was given back"
        start = self._layer_starts[index]
        return self._view[start : start + self.layout.num_blocks * self.layout.layer_block_bytes]

    def parts_of(self, block: int) -> list[memoryview]:
        """A block's bytes, layer after layer."""
        assert self._view is not None, "the memory was given back"
        size, view = self.layout.layer_block_bytes, self._view
        offset = block * size
        return [view[start + offset : start + offset + size] for start in self._layer_starts]

    def checksum_of(self, block: int) -> bytes:
        """Of its bytes as they are, layer after layer."""
        state = Checksum()
        for part in self.parts_of(block):
            state.update(part)
        return state.digest()

    # ---- copies from elsewhere

    def write(self, layer: int, block: int, data: memoryview) -> None:
        """Fill blocks from `block` on in one layer. Not through the mapping: pages that are new cost more
        there. Raises OSError."""
        place = self.layout.place_of(layer, block)
        if os.pwrite(self._descriptor, data, place) != len(data):
            raise OSError("keys and values could not be written whole")

    def set_copied(self, block: int, told: bytes) -> None:
        """A block was filled with bytes of this checksum: `note` need not read them again."""
        self._copied[block] = told

    # ---- what its blocks hold (`KeptBlocks`)

    def found(self) -> Mapping[int, BlockHash]:
        return self._found

    def is_intact(self, block: int) -> bool:
        expected = self._unchecked.pop(block, None)
        return expected is None or expected == self.checksum_of(block)

    def note(self, block: int, block_hash: BlockHash) -> None:
        self._unchecked.pop(block, None)
        told = self._copied.pop(block, b"") or self.checksum_of(block)
        self._write_record(block, _RECORD.pack(block_hash, told))

    def forget(self, block: int) -> None:
        self._unchecked.pop(block, None)
        if self._view is not None:  # else all is forgotten
            self._write_record(block, _NO_RECORD)

    def _write_record(self, block: int, record: bytes) -> None:
        assert self._view is not None, "the memory was given back"
        start = self.layout.records_start + block * _RECORD.size
        self._view[start : start + _RECORD.size] = record

    def _find_blocks(self) -> None:
        assert self._view is not None, "the memory was given back"
        start = self.layout.records_start
        seen = set()
        for block, block_hash, told in read_records(self._view[start : start + self.layout.records_bytes]):
            if block_hash in seen:  # no engine of ours writes that
                self._write_record(block, _NO_RECORD)
                continue
            seen.add(block_hash)
            self._found[block] = block_hash
            self._unchecked[block] = told
