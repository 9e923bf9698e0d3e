"""A ModelRunner without a model: logits are a hash of the context that its KV slots hold.

It writes token ids and positions into slots and reads each context back through the block tables, so any
mistake in tables, slots, positions, sharing or eviction changes the tokens. For tests.
Must not know scheduling or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from headrace.engine.kv_file import KvFile, KvLayout, identity_of
from headrace.engine.protocol import StepInput


def fake_logits(context: Sequence[int], vocab_size: int) -> NDArray[np.float32]:
    """Return the logits after `context`: a function of all its tokens and their positions, in [-4, 4)."""
    packed = np.asarray(context, np.int64).tobytes()
    key = np.uint64(xxhash.xxh3_64_intdigest(packed))
    mixed = key + np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    unit = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return unit * np.float32(8.0) - np.float32(4.0)


class FakeRunner:
    """Behaves as a ModelRunner with `num_blocks` blocks of `block_size` slots."""

    architecture = "fake"
    path = "hash of the context"

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 8,
        vocab_size: int = 61,
        max_context_tokens: int = 4096,
        eos_token_ids: frozenset[int] = frozenset({0}),
        kv_descriptor: int = -1,
    ) -> None:
        """kv_descriptor: a file in which the slots are to outlive this runner; negative: none."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_context_tokens = max_context_tokens
        self.eos_token_ids = eos_token_ids
        self.poison_token = -1
        """A context that holds this token gives NaN logits."""
        self.num_computed_tokens = 0
        self.kv_file: KvFile | None = None
        if kv_descriptor >= 0:
            layout = KvLayout(identity_of(["fake", block_size]), num_blocks, 2, block_size * 8)
            self.kv_file = KvFile(kv_descriptor, layout)
        self.sleep_level = 0
        self.wake_error: Exception | None = None
        """Raised by the next wake."""
        self.wake()

    def check_health(self) -> None:
        """Nothing that it computes with can be lost."""

    def sleep(self, level: Literal[1, 2]) -> None:
        """Forget all slots; a step would break."""
        self.sleep_level = level
        self._slot_tokens = self._slot_positions = np.empty(0, np.int64)
        if self.kv_file is not None:
            self.kv_file.close()

    def wake(self) -> None:
        """Have empty slots again."""
        if self.wake_error is not None:
            error, self.wake_error = self.wake_error, None
            raise error
        if self.kv_file is not None:
            if self.sleep_level:
                self.kv_file.open()
            self._slot_tokens = np.frombuffer(self.kv_file.layer(0), np.int64)
            self._slot_positions = np.frombuffer(self.kv_file.layer(1), np.int64)
            self.sleep_level = 0
            return
        self.sleep_level = 0
        self._slot_tokens = np.full(self.num_blocks * self.block_size, -1, np.int64)
        self._slot_positions = np.full(self.num_blocks * self.block_size, -1, np.int64)

    def execute(self, batch: StepInput) -> torch.Tensor:
        """Store the new tokens, then hash the contexts of the sampled rows: [S, vocab_size]."""
        self._check(batch)
        self._slot_tokens[batch.slots_T] = batch.token_ids_T
        self._slot_positions[batch.slots_T] = batch.positions_T
        self.num_computed_tokens += len(batch.token_ids_T)
        sampled = set(batch.sampled_rows_S.tolist())
        rows = []
        for index, table in enumerate(batch.block_tables):
            start, end = int(batch.query_starts[index]), int(batch.query_starts[index + 1])
            num_before = int(batch.context_lengths_R[index]) - (end - start)
            for row in range(start, end):
                if row in sampled:
                    rows.append(self._logits(table, num_before + row - start + 1))
        stacked = np.stack(rows) if rows else np.empty((0, self.vocab_size), np.float32)
        return torch.from_numpy(stacked)

    def _logits(self, table: Sequence[int], num_tokens: int) -> NDArray[np.float32]:
        places = np.arange(num_tokens)
        slots = np.asarray(table)[places // self.block_size] * self.block_size + places % self.block_size
        wrong = np.flatnonzero(self._slot_positions[slots] != places)
        assert not len(wrong), (
            f"place {wrong[0]} of a context holds position {self._slot_positions[slots[wrong[0]]]}"
        )
        context = self._slot_tokens[slots]
        if self.poison_token in context:
            return np.full(self.vocab_size, np.nan, np.float32)
        return fake_logits(context.tolist(), self.vocab_size)

    def _check(self, batch: StepInput) -> None:
        """Assert what StepInput promises."""
        num_tokens, num_requests = len(batch.token_ids_T), len(batch.block_tables)
        assert len(batch.positions_T) == len(batch.slots_T) == num_tokens > 0
        assert len(batch.query_starts) == num_requests + 1
        assert len(batch.context_lengths_R) == num_requests
        starts = batch.query_starts
        assert starts[0] == 0
        assert starts[-1] == num_tokens
        assert (np.diff(starts) >= 1).all(), f"a request without new tokens: {starts}"
        assert (np.diff(batch.sampled_rows_S) >= 1).all(), f"rows do not rise: {batch.sampled_rows_S}"
        assert len(np.unique(batch.slots_T)) == num_tokens, "two tokens share a slot"
        last = batch.positions_T[starts[1:] - 1] + 1
        assert (last == batch.context_lengths_R).all(), (
            f"contexts {batch.context_lengths_R}, positions end {last}"
        )
