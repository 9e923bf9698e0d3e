"""The two seams of the engine room, and what crosses them.

`Engine`: requests in, one StepBatch per step out (native, simulated; later vllm, remote). Driven by
`engine.process`, one step at a time, in one thread.
`ModelRunner`: one step's flat batch in, logits out. Owned by the native engine; the only one with torch.
Must not know: sockets, text, HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.api.messages import EngineLoad, EngineReady, GenerationRequest, StepBatch
from headrace.engine.kv_file import KvFile

Int32Array = NDArray[np.int32]


class Engine(Protocol):
    """A batch of generations that advances step by step."""

    def describe(self) -> EngineReady:
        """What it serves and with which limits."""
        ...

    def submit(self, request: GenerationRequest) -> None:
        """Take a request. Raises InvalidRequest if it can never run (too long, unsupported field)."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks before the next step. Unknown ids are ignored."""
        ...

    def num_waiting(self) -> int:
        """Requests that wait to run: what `load` says, without its other figures. Asked for each request."""
        ...

    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        ...

    def step(self) -> StepBatch:
        """Advance every scheduled request; a finished request's last output carries its finish_reason.
        A request that was aborted gets no output."""
        ...

    def load(self) -> EngineLoad:
        """The state after the last step."""
        ...

    def sleep(self, level: Literal[1, 2]) -> list[bytes]:
        """Give memory back: 1: keys and values, 2: weights, too. Asleep it refuses requests. Returns the
        hashes of the blocks whose content went. Raises Overloaded while it has requests."""
        ...

    def wake(self) -> None:
        """Take the memory again. Raises OutOfMemory and ModelError, and sleeps on."""
        ...


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step as flat arrays, request after request. T: tokens computed, R: requests, S: rows sampled.

    There is no prefill or decode: each request brings num_new_tokens >= 1 tokens that follow its context.
    """

    token_ids_T: Int32Array
    positions_T: Int32Array
    slots_T: Int32Array
    """Where each token's keys and values go: block_id * block_size + offset."""
    query_starts: Int32Array
    """[R + 1]: request r computes tokens [query_starts[r], query_starts[r + 1])."""
    context_lengths_R: Int32Array
    """Tokens that each request has after this step, its new ones included."""
    block_tables: list[list[int]] | Int32Array
    """R block tables; entry i holds the tokens [i * block_size, (i + 1) * block_size). As an array they are
    filled up to the longest."""
    sampled_rows_S: Int32Array
    """Rows of T whose logits are wanted, rising."""


def padded_tables(tables: list[list[int]] | Int32Array) -> Int32Array:
    """Block tables as one array, filled up with anything: [R, longest]."""
    if isinstance(tables, np.ndarray):
        return tables
    longest = max(map(len, tables))
    padded = np.zeros((len(tables), longest), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


class ModelRunner(Protocol):
    """Weights and KV memory of one model."""

    vocab_size: int
    max_context_tokens: int
    block_size: int
    num_blocks: int
    eos_token_ids: frozenset[int]
    architecture: str
    path: str
    """Which arithmetic runs, for people: `bfloat16 mkldnn, 2 threads`."""
    kv_file: KvFile | None
    """Where its keys and values outlive it; None: they end with it."""

    def execute(self, batch: StepInput) -> Any:
        """Compute one step, writing keys and values into their slots.
        Returns a float32 torch tensor [S, vocab_size] of logits, valid until the next call."""
        ...

    def check_health(self) -> None:
        """Raise EngineDead if steps cannot be computed any more. Asked about once a second, and cheap."""
        ...

    def sleep(self, level: Literal[1, 2]) -> None:
        """Give memory back to the system: 1: of keys and values, whose content is lost; 2: and of weights."""
        ...

    def wake(self) -> None:
        """Take the memory again. Raises OutOfMemory and ModelError; then it sleeps as before."""
        ...
