"""Commands of rank 0 to all others, a step's arrays or a word: through memory that they share, or over links.

One writer; a command is overwritten only when every rank has come to the end of its step, or has answered.
Must not know how a step is computed.
"""

from __future__ import annotations

from ctypes import c_int, c_size_t, c_uint32, c_void_p
from dataclasses import replace
from enum import IntEnum

import numpy as np

from headrace.engine.operations.kernels import Library
from headrace.engine.operations.linked_exchange import LinkedExchange
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.protocol import Int32Array, StepInput, padded_tables
from headrace.errors import EngineDead

SPIN_US = 500
"""A rank looks for its next command so long before it sleeps: longer than the engine's work between two steps
(up to 0.4 ms with 32 streams), since to wake a sleeper takes rank 0 0.2 ms and more."""
_HEAD = 5
_BROKEN = 2
_MOST = 0xFFFFFFFF


class Command(IntEnum):
    """What rank 0 asks for."""

    STEP = 0
    SLEEP_1 = 1
    SLEEP_2 = 2
    WAKE = 3


def shared_sizes(
    library: Library, max_tokens: int, max_requests: int, max_blocks_per_request: int
) -> dict[str, int]:
    """Bytes of the regions that commands and meetings need: room for the largest step, in int32."""
    requests = min(max_requests, max_tokens)
    state_bytes = library.function("headrace_ranks_state_bytes", [], c_size_t)()
    return {"state": state_bytes, "step": 4 * _step_numbers(max_tokens, requests, max_blocks_per_request)}


def _step_numbers(max_tokens: int, requests: int, max_blocks_per_request: int) -> int:
    return _HEAD + 4 * max_tokens + 2 * requests + 1 + requests * max_blocks_per_request


class Mailbox:
    """The region `step` and the number of the last command, in the region `state`."""

    def __init__(self, library: Library, memory: SharedMemory) -> None:
        self._memory = memory  # keeps the addresses valid
        self._state = memory.address("state")
        self._numbers: Int32Array = memory.array("step", np.int32)
        self._post = library.function("headrace_ranks_post", [c_void_p, c_uint32])
        self._await = library.function("headrace_ranks_await", [c_void_p, c_uint32, c_int, c_int], c_int)
        self._break = library.function("headrace_ranks_break", [c_void_p])
        self._number = 0

    def __repr__(self) -> str:
        return f"<Mailbox at command {self._number}>"

    def post_step(self, batch: StepInput) -> StepInput:
        """Give a step to all ranks; return the same step for rank 0 to compute. Raises EngineDead."""
        tables = padded_tables(batch.block_tables)
        head = (Command.STEP, len(batch.token_ids_T), *tables.shape, len(batch.sampled_rows_S))
        arrays = (
            np.array(head, np.int32),
            batch.token_ids_T,
            batch.positions_T,
            batch.slots_T,
            batch.query_starts,
            batch.context_lengths_R,
            batch.sampled_rows_S,
            tables.reshape(-1),
        )  # in the order of _step
        end = sum(map(len, arrays))
        if end > len(self._numbers):
            raise EngineDead(f"a step of {len(batch.token_ids_T)} tokens does not fit into its shared memory")
        np.concatenate(arrays, out=self._numbers[:end])
        self._announce(end)
        return replace(batch, block_tables=tables)

    def post(self, command: Command) -> None:
        """Give a command without arrays to all ranks."""
        self._numbers[0] = command
        self._announce(1)

    def wait(self, limit_s: float) -> bool:
        """Wait for the next command; whether there is one. Raises EngineDead if a rank was lost."""
        is_there = self._has_come(limit_s)
        self._number += is_there
        return is_there

    def read(self) -> tuple[Command, StepInput | None]:
        """The command that `wait` found, and a step's arrays: valid until this rank has computed it."""
        command = Command(int(self._numbers[0]))
        return command, self._step() if command == Command.STEP else None

    def end(self) -> None:
        """Have all ranks end: each wait of theirs, now or later, says that a rank was lost."""
        self._break(self._state)

    def _announce(self, _num_numbers: int) -> None:
        """Have the others see what was written."""
        self._number += 1
        self._post(self._state, self._number & _MOST)

    def _has_come(self, limit_s: float) -> bool:
        status: int = self._await(self._state, (self._number + 1) & _MOST, SPIN_US, int(limit_s * 1000))
        if status == _BROKEN:
            raise EngineDead("another rank was lost")
        return status == 0

    def _step(self) -> StepInput:
        """The arrays that the head describes."""
        _, num_tokens, num_requests, stride, num_sampled = self._numbers[:_HEAD].tolist()
        end = _HEAD

        def take(count: int) -> Int32Array:
            nonlocal end
            end += count
            if end > len(self._numbers):
                raise EngineDead(f"a step of {num_tokens} tokens does not fit into its shared memory")
            return self._numbers[end - count : end]

        return StepInput(
            token_ids_T=take(num_tokens),
            positions_T=take(num_tokens),
            slots_T=take(num_tokens),
            query_starts=take(num_requests + 1),
            context_lengths_R=take(num_requests),
            sampled_rows_S=take(num_sampled),
            block_tables=take(num_requests * stride).reshape(num_requests, stride),
        )


class LinkedMailbox(Mailbox):
    """The same where ranks share no memory: what rank 0 writes into its own, it sends to all others."""

    def __init__(self, library: Library, memory: SharedMemory, exchange: LinkedExchange) -> None:
        """memory: this rank's own. exchange: has the links, which carry nothing else between steps."""
        super().__init__(library, memory)
        self._exchange = exchange

    def _announce(self, num_numbers: int) -> None:
        self._number += 1
        self._exchange.post_command(self._number & _MOST, self._numbers[:num_numbers])

    def _has_come(self, limit_s: float) -> bool:
        number = (self._number + 1) & _MOST
        return self._exchange.await_command(number, self._numbers, SPIN_US, limit_s)
