"""Meetings of ranks on several hosts, over TCP (`kernels/links.h`).

Rows lie in each rank's own memory; at a meeting every rank sends its part of them to all others. Between
steps the same links carry rank 0's commands. Owns what the kernels must know for it. Must not know how ranks
are connected, or what rows and commands mean.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from ctypes import c_int, c_int32, c_size_t, c_uint32, c_void_p

import numpy as np
from torch import Tensor

from headrace.engine.operations.exchange import LATE, MEETING_LIMIT_S, Exchange
from headrace.engine.operations.kernel_structures import Cut
from headrace.engine.operations.kernels import Library
from headrace.engine.operations.shard import Shard
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.protocol import Int32Array


class LinkedExchange(Exchange):
    """One rank's door to others elsewhere."""

    def __init__(
        self,
        library: Library,
        memory: SharedMemory,
        shard: Shard,
        starts: Mapping[str, Sequence[int]],
        links: Mapping[int, socket.socket],
        limit_s: float = MEETING_LIMIT_S,
    ) -> None:
        """memory: this rank's own, with the regions that `Exchange` takes. starts: `column_starts`. links: by
        rank; closed with this object, and used by nobody else. Raises MemoryError."""
        super().__init__(library, memory, shard, [], limit_s)
        self._links = dict(links)
        self._starts = {name: np.array(columns, np.int32) for name, columns in starts.items()}
        self._vocab_starts = self._starts["logits"][:-1]
        sockets = [links[rank].fileno() if rank in links else -1 for rank in range(shard.num_ranks)]
        new = library.function("headrace_links_new", [c_void_p, c_int, c_int, c_int], c_void_p)
        self._free = library.function("headrace_links_free", [c_void_p])
        self._post = library.function("headrace_links_post", [c_void_p, c_uint32, c_void_p, c_size_t], c_int)
        self._await = library.function(
            "headrace_links_await", [c_void_p, c_uint32, c_void_p, c_size_t, c_int, c_int], c_int
        )
        numbers = (c_int32 * len(sockets))(*sockets)
        self.part.links = new(numbers, shard.num_ranks, shard.rank, int(limit_s * 1000))
        if not self.part.links:
            raise MemoryError("no memory for the links to other ranks")
        for name in ("attended", "inner", "output"):
            setattr(self.part, f"{name}_starts", self._starts[name].ctypes.data)

    def __del__(self) -> None:
        if hasattr(self, "part") and self.part.links:
            self._free(self.part.links)
            self.part.links = None
            for link in self._links.values():
                link.close()

    def post_command(self, number: int, command: Int32Array) -> None:
        """Rank 0, between steps: send command `number`, which has begun with 1, to all others. Raises
        EngineDead."""
        self.check(self._post(self.part.links, number, command.ctypes.data, command.nbytes))

    def await_command(self, number: int, into: Int32Array, spin_us: int, limit_s: float) -> bool:
        """Another rank, between steps: wait for command `number`, and write it to the begin of `into`. False:
        there is none within `limit_s`. Raises EngineDead."""
        room = (into.ctypes.data, into.nbytes)
        status: int = self._await(self.part.links, number, *room, spin_us, int(limit_s * 1000))
        if status != LATE:
            self.check(status)
        return status != LATE

    def share_columns(self, name: str, rows: Tensor) -> None:
        starts = self._starts[name].ctypes.data
        self.meet_with(Cut(rows.data_ptr(), len(rows), _row_bytes(rows), starts, rows.element_size(), None))

    def share_rows(self, rows: Tensor, token_ids_T: Int32Array) -> None:
        owners = np.searchsorted(self._vocab_starts, token_ids_T, side="right").astype(np.int32) - np.int32(1)
        self.meet_with(Cut(rows.data_ptr(), len(rows), _row_bytes(rows), None, 0, owners.ctypes.data))


def _row_bytes(rows: Tensor) -> int:
    assert rows.is_contiguous(), "rows with gaps between them"
    return rows.shape[1] * rows.element_size()
