"""Builds a model from its files and computes steps: the ModelRunner of the native engine.

Owns weights and KV memory. Must not know requests, sampling or sockets.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from headrace.api.messages import EngineSpec
from headrace.engine.kv_memory import kv_bytes_per_token, plan_kv_blocks
from headrace.engine.model_files.metadata import ModelMetadata, read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.models.decoder import Decoder, DecoderStep, build_weights
from headrace.engine.operations.interface import Operations, StepLayout
from headrace.engine.operations.select import select_operations
from headrace.engine.protocol import StepInput
from headrace.engine.weights.source import open_weights


class DecoderRunner:
    """A decoder with its KV memory. One caller, one thread; `execute` uses torch's own threads.

    A row's logits are the same bits whoever its partners are, as long as the step has as many rows. They are
    not the same bits in steps of other sizes: oneDNN and MKL pick their kernels by the number of rows.
    SmolLM2, measured alone against in a batch of 2 to 8: 1% of the logits' norm in bfloat16, 1e-6 in float32;
    a prompt in chunks against at once: 0.7% and 0.
    """

    def __init__(
        self, metadata: ModelMetadata, decoder: Decoder, spec: EngineSpec, operations: Operations
    ) -> None:
        h = metadata.hyperparameters
        self.vocab_size = h.vocab_size
        self.block_size = spec.block_size
        self.num_blocks = plan_kv_blocks(spec, h, kv_bytes_per_token(h, operations.dtype.itemsize))
        longest = min(spec.max_context_tokens or h.context_length, h.context_length)
        self.max_context_tokens = min(longest, self.num_blocks * self.block_size)
        self.eos_token_ids = metadata.eos_token_ids
        self.architecture: str = h.architecture
        self.path = operations.description
        self._decoder = decoder
        self._caches = decoder.new_kv_caches(self.num_blocks)

    def __repr__(self) -> str:
        return (
            f"<DecoderRunner {self.architecture} {self.path}, {self.num_blocks} blocks of {self.block_size}>"
        )

    @torch.inference_mode()
    def execute(self, batch: StepInput) -> Tensor:
        """Compute one step. Returns float32 logits [S, vocab_size], valid until the next call."""
        layout = StepLayout(batch.query_starts.tolist(), batch.context_lengths_R.tolist(), batch.block_tables)
        step = DecoderStep(
            token_ids_T=torch.from_numpy(batch.token_ids_T),
            positions_T=torch.from_numpy(batch.positions_T),
            slots_T=torch.from_numpy(batch.slots_T).long(),
            sampled_rows_S=torch.from_numpy(batch.sampled_rows_S),
            layout=layout,
        )
        return self._decoder.forward(step, self._caches)


def load_runner(spec: EngineSpec, files: ModelFiles, on_phase: Callable[[str], None]) -> DecoderRunner:
    """Read metadata and weights, pack them, allocate KV memory. `on_phase` hears what begins.

    Sets torch's thread count for this process. Raises ModelError for files that cannot be served, ConfigError
    for KV memory that does not fit.
    """
    on_phase("reading metadata")
    metadata = read_metadata(files)
    torch.set_num_threads(spec.num_threads or len(os.sched_getaffinity(0)))
    operations = select_operations(spec.dtype, torch.get_num_threads())
    with torch.inference_mode():
        on_phase("loading weights")
        source = open_weights(files, metadata.hyperparameters)
        weights = build_weights(metadata.hyperparameters, source.read, operations, source.rope_divisors())
        on_phase("allocating KV memory")
        decoder = Decoder(metadata.hyperparameters, weights, operations, spec.block_size)
        return DecoderRunner(metadata, decoder, spec, operations)
