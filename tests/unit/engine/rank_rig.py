"""Ranks as threads of one process: each with memory mapped for itself, as processes have it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.operations.exchange import Exchange, exchange_sizes
from headrace.engine.operations.kernels import load_kernels
from headrace.engine.operations.linked_exchange import LinkedExchange
from headrace.engine.operations.shard import column_starts, cut
from headrace.engine.operations.shared_memory import SharedMemory
from headrace.engine.protocol import StepInput
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.engine.workers.links import KEY_BYTES, connect_ranks, listen
from headrace.engine.workers.mailbox import shared_sizes

MAX_TOKENS = 64
LIMIT_S = 20.0


def rank_sizes(h: Hyperparameters) -> dict[str, int]:
    return shared_sizes(load_kernels(), MAX_TOKENS, 8, 32) | exchange_sizes(h, MAX_TOKENS)


class ThreadSeat:
    """Seats of all ranks share what rank 0 decided."""

    def __init__(self, rank: int, num_ranks: int, shared: dict[str, Any], barrier: Barrier) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._shared = shared
        self._barrier = barrier

    def join(self, h: Hyperparameters) -> Exchange:
        sizes = rank_sizes(h)
        if self._rank == 0:
            self._shared["memory"] = SharedMemory(sizes)
        self._barrier.wait(LIMIT_S)
        memory = self._shared["memory"]
        if self._rank:
            memory = SharedMemory(sizes, os.dup(memory.descriptor))
        return Exchange(load_kernels(), memory, cut(h, self._num_ranks)[self._rank], [], LIMIT_S)

    def agree_on_blocks(self, plan: Callable[[], int]) -> int:
        if self._rank == 0:
            self._shared["num_blocks"] = plan()
        self._barrier.wait(LIMIT_S)
        num_blocks: int = self._shared["num_blocks"]
        return num_blocks


class LinkedSeat(ThreadSeat):
    """A seat whose memory no other rank has: each rank is at an address of its own."""

    def join(self, h: Hyperparameters) -> Exchange:
        listener = listen(f"127.0.0.{self._rank + 1}")
        with listener:
            self._shared[f"address {self._rank}"] = listener.getsockname()
            self._barrier.wait(LIMIT_S)
            addresses = {rank: self._shared[f"address {rank}"] for rank in range(self._num_ranks)}
            links = connect_ranks(self._rank, listener, addresses, bytes(KEY_BYTES))
        shard, starts = cut(h, self._num_ranks)[self._rank], column_starts(h, self._num_ranks)
        self._shared.setdefault("links", []).extend(links.values())
        return LinkedExchange(load_kernels(), SharedMemory(rank_sizes(h)), shard, starts, links, LIMIT_S)


class Ranks:
    """All ranks of a model. With links they share no memory, and talk over TCP."""

    def __init__(self, files: ModelFiles, spec: EngineSpec, *, has_links: bool = False) -> None:
        num_ranks = spec.tensor_parallel
        self._pool = ThreadPoolExecutor(num_ranks)
        self._shared = shared = dict[str, Any]()
        seat = LinkedSeat if has_links else ThreadSeat
        barrier = Barrier(num_ranks)

        def load(rank: int) -> DecoderRunner:
            try:
                return load_runner(spec, files, lambda _: None, seat(rank, num_ranks, shared, barrier))
            except BaseException:
                barrier.abort()
                raise

        self.runners = list(self._pool.map(load, range(num_ranks), timeout=LIMIT_S))

    def execute(self, batch: StepInput) -> torch.Tensor:
        """What rank 0 gives, after all ranks have computed the step."""
        steps = [self._pool.submit(runner.execute, batch) for runner in self.runners]
        results: list[torch.Tensor] = [step.result(LIMIT_S) for step in steps]
        return results[0].clone()

    def close(self) -> None:
        self._pool.shutdown()
        for link in self._shared.get("links", []):
            link.close()
