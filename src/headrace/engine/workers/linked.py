"""How ranks that share no memory come together: links, own memory, an exchange and a mailbox over both.

The same for rank 0 and the others. Must not know how they were started.
"""

from __future__ import annotations

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.operations.kernels import load_kernels
from headrace.engine.operations.linked_exchange import LinkedExchange
from headrace.engine.operations.shard import column_starts, cut
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.workers.links import Check, Door, connect_ranks
from headrace.engine.workers.mailbox import LinkedMailbox
from headrace.engine.workers.messages import Join

MEETING_LIMIT_S = 600.0
"""Longest wait until all ranks are connected: one may have to download the model before it comes."""


def join_linked(
    h: Hyperparameters, place: tuple[int, int], door: Door, join: Join, check: Check
) -> tuple[LinkedExchange, LinkedMailbox]:
    """Connect to all other ranks. place: this rank, and how many there are. `door` is closed. check: asked
    while others are waited for. Raises EngineDead, OutOfMemory, and what `check` raises."""
    rank, num_ranks = place
    library, memory = load_kernels(), SharedMemory(join.sizes)
    with door.listener:
        links = connect_ranks(rank, door.listener, join.addresses, door.key, check, MEETING_LIMIT_S)
    starts = column_starts(h, num_ranks)
    shard = cut(h, num_ranks)[rank]
    exchange = LinkedExchange(library, memory, shard, starts, links, join.meeting_limit_s)
    return exchange, LinkedMailbox(library, memory, exchange)
