"""The seam between the block pool and memory that outlives its engine: which blocks hold what, told beside.

Pure. Must not know where that is written down, nor who reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from headrace.engine.kv_cache.prefix_cache import BlockHash


class KeptBlocks(Protocol):
    """Who writes down what each block holds, so that it can be found when the pool's own list is gone."""

    def found(self) -> Mapping[int, BlockHash]:
        """What the engine before this one left: blocks, and what they are said to hold."""
        ...

    def is_intact(self, block: int) -> bool:
        """Whether a block holds what it was left with, if it was found and is unused since; else: yes."""
        ...

    def note(self, block: int, block_hash: BlockHash) -> None:
        """A block is full and computed."""
        ...

    def forget(self, block: int) -> None:
        """A block will hold something else, or is not to be trusted."""
        ...


class NothingKept:
    """Memory that ends with its engine."""

    def found(self) -> Mapping[int, BlockHash]:
        return {}

    def is_intact(self, block: int) -> bool:
        return True

    def note(self, block: int, block_hash: BlockHash) -> None:
        """Nobody would read it."""

    def forget(self, block: int) -> None:
        """Nothing was noted."""
