"""The seam between a decoder and the machine's arithmetic.

A decoder is written against `Operations`; each implementation chooses how weights are packed (plain, oneDNN's
layout, later int8 with its activation scales) and how attention walks the blocks. `reference` is the plain
torch one, `cpu` the fast one; a contract test runs both.
Must not know architectures, requests or files.

Shapes: T tokens of a step, H heads, K KV heads, D head_dim, S rows sampled, R requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.engine.model_files.metadata import Activation


class Linear(Protocol):
    """A packed weight [out_features, in_features]."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        ...

    def add_to(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + linear(x), as a new tensor."""
        ...


class GatedLinear(Protocol):
    """Two packed weights of one shape: activation(gate(x)) * up(x)."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, intermediate_size]."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention must know of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor on q·k."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Which tokens of a step belong together, in plain Python: what attention plans are made from.

    One `window` per plan: a token at position p sees positions (p - window, p]; 0 means all before it.
    """

    query_starts: list[int]
    context_lengths: list[int]
    block_tables: list[list[int]]
    window: int = 0


class Operations(Protocol):
    """One machine's arithmetic. Stateless, apart from what pack_* return."""

    description: str
    """For people: `bfloat16 mkldnn, 2 threads`."""
    dtype: torch.dtype

    def pack_linear(self, weight: Tensor) -> Linear:
        """Take a weight [out_features, in_features] of any float dtype; the caller may drop it after."""
        ...

    def pack_gated(self, gate: Tensor, up: Tensor, activation: Activation) -> GatedLinear: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv:1910.07467)."""
        ...

    def rotate(self, x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        """Rotary embedding over halves (arXiv:2104.09864): x * cos + swap_halves(x) * sin, where the first
        half of `sin` is negated already."""
        ...

    def kv_cache(self, num_blocks: int, block_size: int, shape: AttentionShape) -> Tensor:
        """One layer's KV memory, zeroed lazily: pages become resident when they are first written."""
        ...

    def plan(self, layout: StepLayout, slots_T: Tensor, block_size: int, shape: AttentionShape) -> Any:
        """Indices that all layers of one step with the same window share. Opaque to the decoder."""
        ...

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Write k and v into the cache's slots, then attend over each request's blocks: [T, H * D]."""
        ...
