"""One decoder-only transformer for Llama and Gemma 3: the differences are data (Hyperparameters).

Works on a step's flat batch of tokens, request after request. Owns the order of operations; must not know how
they are computed (`operations`), where weights come from, or who asks.

Shapes: T tokens of a step, H heads, K KV heads, D head_dim, S rows sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.models.rotary import RotaryTable
from headrace.engine.operations.interface import AttentionShape, GatedLinear, Linear, Operations, StepLayout


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's packed weights. Norm weights are vectors in the arithmetic's dtype."""

    attention_norm: Tensor
    qkv: Linear
    """[(H + 2K) * D, hidden_size]: q, k and v in one multiplication."""
    o: Linear
    mlp_norm: Tensor
    gated: GatedLinear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All packed weights of a model."""

    embedding: Tensor
    """[vocab_size, hidden_size], for looking up; the head has its own packing."""
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Linear
    rope_divisors: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderStep:
    """One step's batch as tensors."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    sampled_rows_S: Tensor
    layout: StepLayout


class Decoder:
    """A model's forward pass over paged KV memory. Stateless between steps, apart from the KV caches."""

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        weights: DecoderWeights,
        operations: Operations,
        block_size: int,
    ) -> None:
        h = hyperparameters
        self._h = h
        self._weights = weights
        self._operations = operations
        self._block_size = block_size
        self.shape = AttentionShape(
            h.num_heads, h.num_kv_heads, h.head_dim, h.attention_scale or h.head_dim**-0.5
        )
        self._is_sliding = h.is_sliding_by_layer if h.sliding_window and h.is_sliding_by_layer else ()
        full = RotaryTable(h.head_dim, h.rope_theta, h.rope_scaling, weights.rope_divisors)
        sliding = RotaryTable(h.head_dim, h.rope_theta_sliding) if h.rope_theta_sliding else full
        self._rotary = {False: full, True: sliding}

    def new_kv_caches(self, num_blocks: int) -> list[Tensor]:
        """One cache per layer, for `forward`."""
        return [
            self._operations.kv_cache(num_blocks, self._block_size, self.shape) for _ in self._weights.layers
        ]

    def forward(self, step: DecoderStep, caches: list[Tensor]) -> Tensor:
        """Compute one step, writing keys and values into `caches`. Returns float32 logits [S, vocab_size]."""
        h, operations = self._h, self._operations
        per_kind = {kind: self._prepare(step, kind) for kind in set(self._is_sliding or (False,))}
        x = functional.embedding(step.token_ids_T, self._weights.embedding)
        if h.embedding_scale != 1.0:
            # The scale is rounded to the weights' precision, as the model was trained.
            x = x * torch.tensor(h.embedding_scale, dtype=x.dtype)
        last = len(self._weights.layers) - 1
        for index, layer in enumerate(self._weights.layers):
            is_sliding = self._is_sliding[index] if self._is_sliding else False
            attended = self._attend(layer, x, caches[index], per_kind[is_sliding])
            if index == last:  # from here on only rows whose logits are wanted matter
                attended, x = attended[step.sampled_rows_S], x[step.sampled_rows_S]
            x = self._mlp(layer, self._add_attention(layer, attended, x))
        x = operations.rms_norm(x, self._weights.final_norm, h.norm_eps)
        return self._weights.head(x).float()

    def _prepare(self, step: DecoderStep, is_sliding: bool) -> _LayerKind:
        """What all layers of one kind share in this step: rotary angles and the attention plan."""
        cos, sin = self._rotary[is_sliding].at(step.positions_T, self._operations.dtype)
        layout = step.layout
        if is_sliding:
            layout = StepLayout(
                layout.query_starts, layout.context_lengths, layout.block_tables, self._h.sliding_window
            )
        plan = self._operations.plan(layout, step.slots_T, self._block_size, self.shape)
        return _LayerKind(cos, sin, plan)

    def _attend(self, layer: Layer, x: Tensor, cache: Tensor, kind: _LayerKind) -> Tensor:
        h, operations = self._h, self._operations
        normed = operations.rms_norm(x, layer.attention_norm, h.norm_eps)
        qkv = layer.qkv(normed).view(-1, h.num_heads + 2 * h.num_kv_heads, h.head_dim)
        num_rotated = h.num_heads + h.num_kv_heads
        qk, v = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = operations.rms_norm(qk[:, : h.num_heads], layer.q_norm, h.norm_eps)
            k = operations.rms_norm(qk[:, h.num_heads :], layer.k_norm, h.norm_eps)
            qk = torch.cat((q, k), dim=1)
        qk = operations.rotate(qk, kind.cos_T1D, kind.sin_T1D)
        return operations.attend(qk[:, : h.num_heads], qk[:, h.num_heads :], v, cache, kind.plan)

    def _add_attention(self, layer: Layer, attended: Tensor, x: Tensor) -> Tensor:
        if layer.post_attention_norm is None:
            return layer.o.add_to(attended, x)
        return x + self._operations.rms_norm(layer.o(attended), layer.post_attention_norm, self._h.norm_eps)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        normed = self._operations.rms_norm(x, layer.mlp_norm, self._h.norm_eps)
        if layer.post_mlp_norm is None:
            return layer.down.add_to(layer.gated(normed), x)
        return x + self._operations.rms_norm(
            layer.down(layer.gated(normed)), layer.post_mlp_norm, self._h.norm_eps
        )


@dataclass(frozen=True, slots=True)
class _LayerKind:
    cos_T1D: Tensor
    sin_T1D: Tensor
    plan: Any


def build_weights(
    h: Hyperparameters,
    read: Callable[[str, torch.dtype], Tensor],
    operations: Operations,
    rope_divisors: Tensor | None = None,
) -> DecoderWeights:
    """Pack all weights, one tensor after another, so that at most one layer's originals are in memory.

    `read` takes canonical names (`weights.names`) and the dtype that is wanted.
    """

    def tensor(name: str) -> Tensor:
        return read(name, operations.dtype)

    def layer(index: int) -> Layer:
        at = f"layers.{index}."
        optional = {"q_norm": h.has_qk_norm, "k_norm": h.has_qk_norm}
        optional |= {"post_attention_norm": h.has_post_norms, "post_mlp_norm": h.has_post_norms}
        return Layer(
            attention_norm=tensor(at + "attention_norm"),
            qkv=operations.pack_linear(torch.cat([tensor(at + part) for part in "qkv"])),
            o=operations.pack_linear(tensor(at + "o")),
            mlp_norm=tensor(at + "mlp_norm"),
            gated=operations.pack_gated(tensor(at + "gate"), tensor(at + "up"), h.activation),
            down=operations.pack_linear(tensor(at + "down")),
            **{name: tensor(at + name) for name, is_present in optional.items() if is_present},
        )

    embedding = tensor("embedding")
    layers = tuple(layer(index) for index in range(h.num_layers))
    head = operations.pack_linear(embedding if h.is_tied else tensor("output"))
    return DecoderWeights(embedding, layers, tensor("final_norm"), head, rope_divisors)
