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
from headrace.engine.operations.exchange import Exchange
from headrace.engine.operations.interface import Read, check_packed, read_rows
from headrace.engine.operations.memory import LayerMemory, lazy_cache, own_memory
from headrace.engine.operations.shard import Shard, whole
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

    def kv_shape(self, num_blocks: int, block_size: int, shape: AttentionShape) -> tuple[int, ...]:
        """Of one layer's KV memory, in numbers of `dtype`; blocks are one after another."""
        ...

    def plan(self, layout: StepLayout, slots_T: Tensor, block_size: int, shape: AttentionShape) -> Any:
        """Indices that all layers of one step with the same window share. Opaque to the blocks."""
        ...

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Write k and v into the cache's slots, then attend over each request's blocks: [T, H * D]."""
        ...


class TorchOperations:
    """Operations in torch. Packed tensors are the model's own in the primitives' dtype, q, k and v as one."""

    def __init__(self, primitives: Primitives, exchange: Exchange | None = None) -> None:
        """With `exchange`, one rank of several."""
        self._primitives = primitives
        self._exchange = exchange
        self.shard_name = "" if exchange is None else exchange.shard.name
        self.description = primitives.description
        self.arithmetic = str(primitives.dtype).removeprefix("torch.")
        self.packed_version = "2"
        self.kv_content = f"{self.arithmetic} {type(primitives).__name__}"
        self.bytes_per_weight = float(primitives.dtype.itemsize)

    def pack(self, h: Hyperparameters, read: Read) -> dict[str, Tensor]:
        tensors = {}
        read = read_rows(read, self._shard(h))
        for name in _packed_shapes(h, self._shard(h)):
            prefix, _, part = name.rpartition(".")
            if part == "qkv":
                tensors[name] = torch.cat([read(f"{prefix}.{each}", self._primitives.dtype) for each in part])
            else:
                tensors[name] = read(name, self._primitives.dtype).contiguous()
        return tensors

    def kv_block_bytes(self, h: Hyperparameters, block_size: int) -> int:
        num_bytes = block_size * kv_bytes_per_token(h, self._primitives.dtype.itemsize)
        return num_bytes * self.num_kv_heads(h) // h.num_kv_heads

    def num_kv_heads(self, h: Hyperparameters) -> int:
        return len(self._shard(h).kv_heads)

    def _shard(self, h: Hyperparameters) -> Shard:
        return whole(h) if self._exchange is None else self._exchange.shard

    def load(self, h: Hyperparameters, tensors: Mapping[str, Tensor], max_context_tokens: int) -> TorchBlocks:
        dtype, shapes = self._primitives.dtype, _packed_shapes(h, self._shard(h))
        check_packed({name: (shape, dtype) for name, shape in shapes.items()}, tensors)
        return TorchBlocks(h, tensors, self._primitives, self._exchange)


def _packed_shapes(h: Hyperparameters, shard: Shard) -> dict[str, tuple[int, ...]]:
    """The model's own tensors, with q, k and v as one; of each matrix the shard's rows."""
    shapes = expected_shapes(h)
    for name, (_, *others) in shapes.items():
        if (rows := shard.rows(name)) is not None:
            shapes[name] = (len(rows), *others)
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

    def __init__(
        self,
        h: Hyperparameters,
        tensors: Mapping[str, Tensor],
        primitives: Primitives,
        exchange: Exchange | None = None,
    ) -> None:
        self._h = h
        self._primitives = primitives
        self._exchange = exchange
        self._shard = shard = whole(h) if exchange is None else exchange.shard
        self._shape = AttentionShape(
            len(shard.heads), len(shard.kv_heads), h.head_dim, h.attention_scale or h.head_dim**-0.5
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

    def new_kv_caches(
        self, num_blocks: int, block_size: int, memory: LayerMemory = own_memory
    ) -> list[Tensor]:
        self._block_size = block_size
        shape = self._primitives.kv_shape(num_blocks, block_size, self._shape)
        dtype = self._primitives.dtype
        return [lazy_cache(memory, layer, shape, dtype) for layer in range(len(self._layers))]

    def prepare(self, batch: StepInput) -> _Step:
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths_R.tolist()
        positions, slots = torch.from_numpy(batch.positions_T), torch.from_numpy(batch.slots_T).long()
        tables = batch.block_tables
        lists: list[list[int]] = tables if isinstance(tables, list) else tables.tolist()
        by_kind = {}
        for kind in set(self._is_sliding or (False,)):
            cos, sin = self._rotary[kind].at(positions, self._primitives.dtype)
            layout = StepLayout(starts, contexts, lists, self._h.sliding_window if kind else 0)
            by_kind[kind] = _LayerKind(
                cos, sin, self._primitives.plan(layout, slots, self._block_size, self._shape)
            )
        return _Step(torch.from_numpy(batch.token_ids_T), by_kind)

    def embed(self, step: _Step) -> Tensor:
        x = self._look_up(step.token_ids_T)
        # The scale is rounded to the weights' precision, as the model was trained.
        return x * torch.tensor(self._h.embedding_scale, dtype=x.dtype) if self._h.embedding_scale != 1 else x

    def _look_up(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings. Of several ranks each knows some tokens'."""
        if self._exchange is None:
            return functional.embedding(token_ids_T, self._embedding)
        size = (len(token_ids_T), self._h.hidden_size)
        rows = self._exchange.rows("output", *size, self._embedding.dtype)
        vocab = self._shard.vocab
        own = torch.nonzero((token_ids_T >= vocab.start) & (token_ids_T < vocab.stop)).squeeze(1)
        rows[own] = self._embedding[token_ids_T[own] - vocab.start]
        self._exchange.share_rows(rows, token_ids_T.numpy())
        return rows.clone()

    def attend(self, layer: int, x: Tensor, step: _Step, cache: Tensor) -> Tensor:
        h, primitives, weights = self._h, self._primitives, self._layers[layer]
        kind = step.by_kind[bool(self._is_sliding) and self._is_sliding[layer]]
        normed = primitives.rms_norm(x, weights.attention_norm, h.norm_eps)
        num_heads, num_kv_heads = self._shape.num_heads, self._shape.num_kv_heads
        qkv = weights.qkv(normed).view(-1, num_heads + 2 * num_kv_heads, h.head_dim)
        num_rotated = num_heads + num_kv_heads
        qk, v = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if weights.q_norm is not None and weights.k_norm is not None:
            q = primitives.rms_norm(qk[:, :num_heads], weights.q_norm, h.norm_eps)
            k = primitives.rms_norm(qk[:, num_heads:], weights.k_norm, h.norm_eps)
            qk = torch.cat((q, k), dim=1)
        qk = primitives.rotate(qk, kind.cos_T1D, kind.sin_T1D)
        attended = primitives.attend(qk[:, :num_heads], qk[:, num_heads:], v, cache, kind.plan)
        if self._exchange is not None:
            heads = self._shard.heads
            columns = range(heads.start * h.head_dim, heads.stop * h.head_dim)
            attended = self._exchange.gather("attended", columns, attended, h.num_heads * h.head_dim)
        return self._add(weights.o, attended, weights.post_attention_norm, x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        h, weights = self._h, self._layers[layer]
        gated = weights.gated(self._primitives.rms_norm(x, weights.mlp_norm, h.norm_eps))
        if self._exchange is not None:
            gated = self._exchange.gather("inner", self._shard.inner, gated, h.intermediate_size)
        return self._add(weights.down, gated, weights.post_mlp_norm, x)

    def _add(self, linear: Linear, inner: Tensor, post_norm: Tensor | None, x: Tensor) -> Tensor:
        """x + linear(inner), normed before it is added where the model has such a norm."""
        if self._exchange is None and post_norm is None:
            return linear.add_to(inner, x)
        y = linear(inner)
        if self._exchange is not None:
            y = self._exchange.gather("output", self._shard.hidden, y, self._h.hidden_size)
        return x + (y if post_norm is None else self._primitives.rms_norm(y, post_norm, self._h.norm_eps))

    def head(self, x: Tensor) -> Tensor:
        logits = self._head(self._primitives.rms_norm(x, self._final_norm, self._h.norm_eps)).float()
        if self._exchange is None:
            return logits
        return self._exchange.gather("logits", self._shard.vocab, logits, self._h.vocab_size)
