"""The seam between a decoder and the machine's arithmetic: four fused operations per step and layer.

`Operations.pack` turns a model's tensors into the form that this arithmetic computes with, a flat dict that
can be written to disk; `Operations.load` makes `Blocks` of it, without copying where the arithmetic allows.
A decoder calls Blocks. `torch_blocks` computes them in torch, plainly (`reference`) or fast (`cpu`), `int8`
in C++.
Must not know architectures, requests or files.

Shapes: T tokens of a step, S rows sampled. x is [T, hidden_size], in whatever dtype the blocks choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.operations.memory import LayerMemory, own_memory
from headrace.engine.operations.shard import Shard
from headrace.engine.protocol import StepInput
from headrace.errors import ModelError

Read = Callable[[str, torch.dtype], Tensor]
"""Reads a tensor by its canonical name (`weights.names`), in the dtype that is wanted."""


class Blocks(Protocol):
    """A model ready to compute. One caller, one thread. A step's values are valid until the next one."""

    def new_kv_caches(
        self, num_blocks: int, block_size: int, memory: LayerMemory = own_memory
    ) -> list[Tensor]:
        """One cache per layer in its memory, zeroed lazily: pages become resident when they are first
        written. In each, blocks are one after another, all of the same bytes."""
        ...

    def prepare(self, batch: StepInput) -> Any:
        """What all layers of a step share. Opaque to the decoder."""
        ...

    def embed(self, step: Any) -> Tensor:
        """The tokens' embeddings, scaled as the model wants: x."""
        ...

    def attend(self, layer: int, x: Tensor, step: Any, cache: Tensor) -> Tensor:
        """x + attention(norm(x)) with all that belongs to it: projections, rotary embedding, the norms
        that the model has. Writes the step's keys and values into `cache`. May change x in place."""
        ...

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """x + down(activation(gate(norm(x))) * up(norm(x))), any number of rows. May change x in place."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """Logits of rows: float32 [S, vocab_size]."""
        ...


class Operations(Protocol):
    """One machine's arithmetic."""

    description: str
    """For people: `int8 avx512-vnni, 2 threads`."""
    arithmetic: str
    """`int8`, `bfloat16`, `float32`: names what `pack` returns, together with packed_version."""
    packed_version: str
    """Changes when what `pack` returns does."""
    kv_content: str
    """Names what decides the bytes of keys and values in memory, apart from the model and sizes."""
    bytes_per_weight: float
    """About, once packed; of the whole model, also where this rank has a part of it."""
    shard_name: str
    """Which part of every matrix is packed and computed here; empty: all of it."""

    def pack(self, h: Hyperparameters, read: Read) -> dict[str, Tensor]:
        """Read every tensor of the model once and pack it. Returns contiguous tensors by name; at most a few
        tensors' originals are in memory at a time."""
        ...

    def num_kv_heads(self, h: Hyperparameters) -> int:
        """KV heads that are kept here."""
        ...

    def kv_block_bytes(self, h: Hyperparameters, block_size: int) -> int:
        """KV memory of one block in all layers, of this rank's KV heads."""
        ...

    def load(self, h: Hyperparameters, tensors: Mapping[str, Tensor], max_context_tokens: int) -> Blocks:
        """Make blocks of what `pack` returned, or of the same read back, with `rope_divisors` where a model
        has them. It may be read-only mapped memory, aligned to 64 bytes. Raises ModelError where names or
        shapes differ."""
        ...


def read_rows(read: Read, shard: Shard) -> Read:
    """Return a reader that gives this rank's rows of each tensor only."""

    def read_own(name: str, dtype: torch.dtype) -> Tensor:
        rows, tensor = shard.rows(name), read(name, dtype)
        return tensor if rows is None else tensor[rows.start : rows.stop]

    return read_own if not shard.is_whole else read


def check_packed(
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Mapping[str, Tensor]
) -> None:
    """Compare packed tensors with what a model needs. Raises ModelError."""
    for name, (shape, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelError(f"packed weights: {name} is missing; pack the model again")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ModelError(
                f"packed weights: {name} is {list(tensor.shape)} {tensor.dtype} and must be {list(shape)} "
                f"{dtype}; pack the model again"
            )
