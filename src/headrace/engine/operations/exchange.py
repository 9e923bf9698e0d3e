"""Where the ranks of one engine meet, and the rows that they make together (ADR 32).

A rank writes its columns of some rows into shared memory, meets the others, and then reads whole rows. Rows
of one name are overwritten one meeting after all ranks have read them, at the earliest: the order of a block
sees to it. Must not know processes, requests, or what the rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_int, c_int32, c_void_p, cast
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.operations.kernel_structures import Cut, RankPart
from headrace.engine.operations.kernels import Library
from headrace.engine.operations.shard import Shard
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.protocol import Int32Array
from headrace.errors import EngineDead

MEETING_LIMIT_S = 20.0
"""Longest wait for another rank within a step: far longer than any block of a step takes."""
_FIRST_SPIN_US = 32
LOST, LATE = 2, 3
"""What a call of the kernels returns where ranks did not meet (`kernels/ranks.h`)."""


def exchange_sizes(h: Hyperparameters, max_rows: int) -> dict[str, int]:
    """Bytes of each region that ranks of a model share, for steps of at most `max_rows` tokens."""
    widths = {
        "attended": h.num_heads * h.head_dim,
        "inner": h.intermediate_size,
        "output": h.hidden_size,
        "logits": h.vocab_size,
    }
    return {name: 4 * max_rows * width for name, width in widths.items()}


class Exchange:
    """One rank's door to the others."""

    def __init__(
        self,
        library: Library,
        memory: SharedMemory,
        shard: Shard,
        watched: Sequence[int],
        limit_s: float = MEETING_LIMIT_S,
    ) -> None:
        """`memory` has the regions of `exchange_sizes` and `state`, the kernels' own. `watched`: sockets
        whose other ends close when another rank ends; they must stay open as long as this object."""
        self.shard = shard
        self._memory = memory
        self._limit_s = limit_s
        self._watched = (c_int32 * max(len(watched), 1))(*watched)
        self._meet = library.function("headrace_ranks_meet", [c_void_p, c_void_p], c_int)
        self._missing = library.function("headrace_ranks_missing", [c_void_p], c_int)
        self.part = RankPart(
            memory.address("state"),
            addressof(self._watched),
            len(watched),
            shard.rank,
            shard.num_ranks,
            int(limit_s * 1000),
            _FIRST_SPIN_US,
            memory.address("attended"),
            memory.address("inner"),
            memory.address("output"),
            shard.heads.start * shard.head_dim,
            shard.inner.start,
            shard.hidden.start,
        )

    def __repr__(self) -> str:
        return f"<Exchange {self.shard.name}, {self._memory!r}>"

    def meet(self) -> None:
        """Wait until all ranks are here: what they wrote before is then seen. Raises EngineDead."""
        self.meet_with(Cut())

    def meet_with(self, cut: Cut) -> None:
        """Meet; where memory is not shared, `cut` is what is sent and received. Raises EngineDead."""
        self.check(self._meet(byref(self.part), byref(cut)))

    def share_columns(self, name: str, rows: Tensor) -> None:
        """Meet, with own columns of the shared rows `name` written: afterwards all are. Raises EngineDead."""
        self.meet()

    def share_rows(self, rows: Tensor, token_ids_T: Int32Array) -> None:
        """Meet, with the rows of tokens of own vocabulary written: afterwards all are. Raises EngineDead."""
        self.meet()

    def check(self, status: int) -> None:
        """Raise EngineDead if `status`, which a call of the kernels gave, says that ranks did not meet."""
        if status == LOST:
            raise EngineDead("a rank was lost")
        if status == LATE:
            rank = self._missing(byref(self.part))
            raise EngineDead(f"rank {rank} has not come within {self._limit_s:g} s: it hangs")

    def rows(self, name: str, num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The shared rows `name`: [num_rows, width], to be written and read as `meet` allows."""
        return self._view(name, dtype)[: num_rows * width].view(num_rows, width)

    def gather(self, name: str, columns: range, own: Tensor, width: int) -> Tensor:
        """Give this rank's `own` columns of rows, [N, len(columns)]; return the whole rows, [N, width]: valid
        until this rank meets the others again."""
        rows = self.rows(name, own.shape[0], width, own.dtype)
        rows[:, columns.start : columns.stop] = own
        self.share_columns(name, rows)
        return rows

    def _view(self, name: str, dtype: torch.dtype) -> Tensor:
        numbers: Any = self._memory.array(name, np.uint8)
        return torch.from_numpy(numbers).view(dtype)


def part_pointer(exchange: Exchange | None) -> c_void_p | None:
    """What the kernels take: a rank's part, or null where one process computes alone."""
    return None if exchange is None else cast(byref(exchange.part), c_void_p)
