"""Builds a model from its files and computes steps: the ModelRunner of the native engine.

Owns weights and KV memory, one rank's where several compute together. Must not know requests, sampling,
sockets or processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from headrace import __version__
from headrace.api.messages import EngineSpec
from headrace.engine.kv_file import KvFile, KvLayout, held_bytes, identity_of
from headrace.engine.kv_memory import does_not_fit, free_memory_bytes, longest_context, plan_kv_blocks
from headrace.engine.model_files.metadata import Hyperparameters, ModelMetadata, read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.models.decoder import Decoder
from headrace.engine.operations.exchange import Exchange
from headrace.engine.operations.interface import Operations
from headrace.engine.operations.kernels import Team
from headrace.engine.operations.memory import LayerMemory, give_back, own_memory
from headrace.engine.operations.select import select_operations
from headrace.engine.operations.shard import num_kv_heads_of_all
from headrace.engine.protocol import StepInput
from headrace.engine.weights.loading import Packing, check_free, check_unchanged, load_tensors
from headrace.engine.weights.stamp import stamp_files


class Seat(Protocol):
    """A rank's place in its group, while it loads (`engine.workers`)."""

    def join(self, h: Hyperparameters) -> Exchange:
        """Become one of the ranks that compute this model. Raises ConfigError where it cannot be cut so."""
        ...

    def agree_on_blocks(self, plan: Callable[[], int]) -> int:
        """Return the number of KV blocks that all ranks have: rank 0 plans it."""
        ...


class DecoderRunner:
    """A decoder with its KV memory. One caller, one thread; `execute` uses torch's own threads.

    In int8 a row's logits are the same bits whatever else is in the step, however its prompt was chunked or
    cached, with any number of threads. In bfloat16 and float32 they are the same bits whoever its partners
    are, as long as the step has as many rows; not in steps of other sizes: oneDNN and MKL pick their kernels
    by the number of rows. SmolLM2, measured alone against in a batch of 2 to 8: 1% of the logits' norm in
    bfloat16, 1e-6 in float32; a prompt in chunks against at once: 0.7% and 0.
    """

    def __init__(
        self,
        metadata: ModelMetadata,
        load_decoder: Callable[[], Decoder],
        spec: EngineSpec,
        operations: Operations,
        on_phase: Callable[[str], None] = lambda _phase: None,
        seat: Seat | None = None,
        kv_traits: Sequence[Any] = (),
    ) -> None:
        """With `seat`, one rank of spec.tensor_parallel. `kv_traits`: what decides the content of KV memory,
        apart from its sizes, where it is to outlive the engine (spec.kv_descriptor)."""
        h = metadata.hyperparameters
        self.vocab_size = h.vocab_size
        self.block_size = spec.block_size
        block_bytes = operations.kv_block_bytes(h, spec.block_size)
        num_kv_heads = h.num_kv_heads if seat is None else num_kv_heads_of_all(h, spec.tensor_parallel)

        def plan() -> int:
            all_bytes = block_bytes * num_kv_heads // operations.num_kv_heads(h)
            return plan_kv_blocks(spec, h, -(-all_bytes // spec.block_size), held_bytes(spec.kv_descriptor))

        self.num_blocks = plan() if seat is None else seat.agree_on_blocks(plan)
        self._kv_bytes = self.num_blocks * block_bytes
        self.max_context_tokens = min(longest_context(spec, h), self.num_blocks * self.block_size)
        self.eos_token_ids = metadata.eos_token_ids
        self.architecture: str = h.architecture
        self.path = operations.description
        self.team: Team | None = getattr(operations, "team", None)
        """The threads of a step, which the sampler uses, too; None: torch's own."""
        self._load_decoder = load_decoder
        self._decoder: Decoder | None = load_decoder()
        on_phase("allocating KV memory")
        self.kv_file: KvFile | None = None
        """Where keys and values outlive the engine; None: they end with it."""
        try:
            if spec.kv_descriptor >= 0:
                layer_block_bytes = block_bytes // h.num_layers
                identity = identity_of([*kv_traits, spec.block_size, h.num_layers, layer_block_bytes])
                layout = KvLayout(identity, self.num_blocks, h.num_layers, layer_block_bytes)
                self.kv_file = KvFile(spec.kv_descriptor, layout)
            self._caches = self._new_caches(self._decoder)
        except MemoryError as error:  # a limit that free memory does not show, such as ulimit -v
            raise does_not_fit(self._kv_bytes, free_memory_bytes(), block_bytes) from error

    def __repr__(self) -> str:
        return (
            f"<DecoderRunner {self.architecture} {self.path}, {self.num_blocks} blocks of {self.block_size}>"
        )

    def check_health(self) -> None:
        """Raise EngineDead if steps cannot be computed any more: never, in one process."""

    @torch.inference_mode()
    def execute(self, batch: StepInput) -> Tensor:
        """Compute one step. Returns float32 logits [S, vocab_size], valid until the next call."""
        assert self._decoder is not None, f"a step of a sleeping runner: {self!r}"
        return self._decoder.forward(batch, self._caches)

    def sleep(self, level: Literal[1, 2]) -> None:
        """Give memory back to the system: 1: of keys and values, whose content is lost; 2: and of weights."""
        self._caches = []
        if self.kv_file is not None:
            self.kv_file.close()
        if level == 2:
            self._decoder = None
        give_back()

    @torch.inference_mode()
    def wake(self) -> None:
        """Take the memory again. Raises OutOfMemory, and what loading raises; then it sleeps as before."""
        check_free(self._kv_bytes, "keys and values")
        decoder = self._decoder or self._load_decoder()
        if self.kv_file is not None:
            self.kv_file.open()
        self._caches = self._new_caches(decoder)
        self._decoder = decoder

    def _new_caches(self, decoder: Decoder) -> list[Tensor]:
        file = self.kv_file
        memory: LayerMemory = own_memory if file is None else lambda layer, _num_bytes: file.layer(layer)
        return decoder.new_kv_caches(self.num_blocks, self.block_size, memory)


def load_runner(
    spec: EngineSpec, files: ModelFiles, on_phase: Callable[[str], None], seat: Seat | None = None
) -> DecoderRunner:
    """Read metadata and weights, pack them, allocate KV memory. `on_phase` hears what begins. With `seat`,
    one rank's part.

    Sets torch's thread count for this process. Raises ModelError for files that cannot be served, ConfigError
    for KV memory that does not fit.
    """
    on_phase("reading metadata")
    metadata = read_metadata(files)
    num_threads = spec.num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads if seat is None else max(1, num_threads // spec.tensor_parallel))
    h = metadata.hyperparameters
    exchange = None if seat is None else seat.join(h)
    operations = select_operations(spec.dtype, spec.kv_dtype, torch.get_num_threads(), h, exchange)
    packing = Packing(
        f"{operations.arithmetic} {operations.shard_name}".rstrip(),
        operations.packed_version,
        operations.bytes_per_weight / (1 if seat is None else spec.tensor_parallel),
        operations.pack,
    )

    stamps = stamp_files(files)

    def load_decoder() -> Decoder:
        check_unchanged(files, stamps)  # who wakes must be who fell asleep
        tensors = load_tensors(files, h, packing, spec.packed_dir, on_phase)
        on_phase("loading weights")
        return Decoder(h.num_layers, operations.load(h, tensors, longest_context(spec, h)))

    kv_traits = (__version__, operations.kv_content, stamps)
    with torch.inference_mode():
        return DecoderRunner(metadata, load_decoder, spec, operations, on_phase, seat, kv_traits)
