"""A decoder's blocks in torch, written against a few primitives: plain (`reference`) or fast (`cpu`).

The readable description of what a block computes; `int8` computes the same in C++.
Must not know requests or files.

Shapes: T tokens of a step, H heads, K KV heads, D head_dim, S rows sampled, R requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headrace.engine.kv_memory import kv_bytes_per_token
from headrace.engine.model_files.metadata import Activation, Hyperparameters
from headrace.engine.models.rotary import RotaryTable
from headrace.engine.operations.interface import Read, check_packed
from headrace.engine.protocol import StepInput
from headrace.engine.weights.names import expected_shapes


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


class Primitives(Protocol):
    """What torch blocks are made of."""

    description: str
    dtype: torch.dtype

    def pack_linear(self, weight: Tensor) -> Linear:
        """Take a weight [out_features, in_features] in `dtype`."""
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
        """One layer's KV memory."""
        ...

    def plan(self, layout: StepLayout, slots_T: Tensor, block_size: int, shape: AttentionShape) -> Any:
        """Indices that all layers of one step with the same window share. Opaque to the blocks."""
        ...

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Write k and v into the cache's slots, then attend over each request's blocks: [T, H * D]."""
        ...


class TorchOperations:
    """Operations in torch. Packed tensors are the model's own in the primitives' dtype, q, k and v as one."""

    def __init__(self, primitives: Primitives) -> None:
        self._primitives = primitives
        self.description = primitives.description
        self.arithmetic = str(primitives.dtype).removeprefix("torch.")
        self.packed_version = "2"
        self.bytes_per_weight = float(primitives.dtype.itemsize)

    def pack(self, h: Hyperparameters, read: Read) -> dict[str, Tensor]:
        tensors = {}
        for name in _packed_shapes(h):
            prefix, _, part = name.rpartition(".")
            if part == "qkv":
                tensors[name] = torch.cat([read(f"{prefix}.{each}", self._primitives.dtype) for each in part])
            else:
                tensors[name] = read(name, self._primitives.dtype).contiguous()
        return tensors

    def kv_block_bytes(self, h: Hyperparameters, block_size: int) -> int:
        return block_size * kv_bytes_per_token(h, self._primitives.dtype.itemsize)

    def load(self, h: Hyperparameters, tensors: Mapping[str, Tensor], max_context_tokens: int) -> TorchBlocks:
        dtype = self._primitives.dtype
        check_packed({name: (shape, dtype) for name, shape in _packed_shapes(h).items()}, tensors)
        return TorchBlocks(h, tensors, self._primitives)


def _packed_shapes(h: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """The model's own tensors, with q, k and v as one."""
    shapes = expected_shapes(h)
    for layer in range(h.num_layers):
        at = f"layers.{layer}."
        num_rows = sum(shapes.pop(at + part)[0] for part in "qkv")
        shapes[at + "qkv"] = (num_rows, h.hidden_size)
    return shapes


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: Linear
    o: Linear
    mlp_norm: Tensor
    gated: GatedLinear
    down: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    post_attention_norm: Tensor | None
    post_mlp_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class _LayerKind:
    """What all layers of one kind share in a step."""

    cos_T1D: Tensor
    sin_T1D: Tensor
    plan: Any


@dataclass(frozen=True, slots=True)
class _Step:
    token_ids_T: Tensor
    by_kind: dict[bool, _LayerKind]


class TorchBlocks:
    """A model's weights in the primitives' packing."""

    def __init__(self, h: Hyperparameters, tensors: Mapping[str, Tensor], primitives: Primitives) -> None:
        self._h = h
        self._primitives = primitives
        self._shape = AttentionShape(
            h.num_heads, h.num_kv_heads, h.head_dim, h.attention_scale or h.head_dim**-0.5
        )
        self._is_sliding = h.is_sliding_by_layer if h.sliding_window and h.is_sliding_by_layer else ()
        full = RotaryTable(h.head_dim, h.rope_theta, h.rope_scaling, tensors.get("rope_divisors"))
        sliding = RotaryTable(h.head_dim, h.rope_theta_sliding) if h.rope_theta_sliding else full
        self._rotary = {False: full, True: sliding}
        self._embedding = tensors["embedding"]
        self._layers = [self._layer(tensors, f"layers.{index}.") for index in range(h.num_layers)]
        self._final_norm = tensors["final_norm"]
        self._head = primitives.pack_linear(tensors["embedding" if h.is_tied else "output"])
        self._block_size = 0

    def _layer(self, tensors: Mapping[str, Tensor], at: str) -> _Layer:
        pack = self._primitives.pack_linear
        return _Layer(
            attention_norm=tensors[at + "attention_norm"],
            qkv=pack(tensors[at + "qkv"]),
            o=pack(tensors[at + "o"]),
            mlp_norm=tensors[at + "mlp_norm"],
            gated=self._primitives.pack_gated(tensors[at + "gate"], tensors[at + "up"], self._h.activation),
            down=pack(tensors[at + "down"]),
            q_norm=tensors.get(at + "q_norm"),
            k_norm=tensors.get(at + "k_norm"),
            post_attention_norm=tensors.get(at + "post_attention_norm"),
            post_mlp_norm=tensors.get(at + "post_mlp_norm"),
        )

    def new_kv_caches(self, num_blocks: int, block_size: int) -> list[Tensor]:
        self._block_size = block_size
        return [self._primitives.kv_cache(num_blocks, block_size, self._shape) for _ in self._layers]

    def prepare(self, batch: StepInput) -> _Step:
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths_R.tolist()
        positions, slots = torch.from_numpy(batch.positions_T), torch.from_numpy(batch.slots_T).long()
        by_kind = {}
        for kind in set(self._is_sliding or (False,)):
            cos, sin = self._rotary[kind].at(positions, self._primitives.dtype)
            layout = StepLayout(starts, contexts, batch.block_tables, self._h.sliding_window if kind else 0)
            by_kind[kind] = _LayerKind(
                cos, sin, self._primitives.plan(layout, slots, self._block_size, self._shape)
            )
        return _Step(torch.from_numpy(batch.token_ids_T), by_kind)

    def embed(self, step: _Step) -> Tensor:
        x = functional.embedding(step.token_ids_T, self._embedding)
        # The scale is rounded to the weights' precision, as the model was trained.
        return x * torch.tensor(self._h.embedding_scale, dtype=x.dtype) if self._h.embedding_scale != 1 else x

    def attend(self, layer: int, x: Tensor, step: _Step, cache: Tensor) -> Tensor:
        h, primitives, weights = self._h, self._primitives, self._layers[layer]
        kind = step.by_kind[bool(self._is_sliding) and self._is_sliding[layer]]
        normed = primitives.rms_norm(x, weights.attention_norm, h.norm_eps)
        qkv = weights.qkv(normed).view(-1, h.num_heads + 2 * h.num_kv_heads, h.head_dim)
        num_rotated = h.num_heads + h.num_kv_heads
        qk, v = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if weights.q_norm is not None and weights.k_norm is not None:
            q = primitives.rms_norm(qk[:, : h.num_heads], weights.q_norm, h.norm_eps)
            k = primitives.rms_norm(qk[:, h.num_heads :], weights.k_norm, h.norm_eps)
            qk = torch.cat((q, k), dim=1)
        qk = primitives.rotate(qk, kind.cos_T1D, kind.sin_T1D)
        attended = primitives.attend(qk[:, : h.num_heads], qk[:, h.num_heads :], v, cache, kind.plan)
        if weights.post_attention_norm is None:
            return weights.o.add_to(attended, x)
        return x + primitives.rms_norm(weights.o(attended), weights.post_attention_norm, h.norm_eps)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        primitives, weights, eps = self._primitives, self._layers[layer], self._h.norm_eps
        gated = weights.gated(primitives.rms_norm(x, weights.mlp_norm, eps))
        if weights.post_mlp_norm is None:
            return weights.down.add_to(gated, x)
        return x + primitives.rms_norm(weights.down(gated), weights.post_mlp_norm, eps)

    def head(self, x: Tensor) -> Tensor:
        return self._head(self._primitives.rms_norm(x, self._final_norm, self._h.norm_eps)).float()
