"""Plain torch primitives: short, obviously right, any dtype. The yardstick for the fast ones.

Must not know architectures, requests or files. Shape letters as in `torch_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headrace.engine.model_files.metadata import Activation
from headrace.engine.operations.torch_blocks import AttentionShape, GatedLinear, Linear, StepLayout


class PlainLinear:
    """A weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight)

    def add_to(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + functional.linear(x, self._weight)


class PlainGatedLinear:
    """Gate and up projections as they are."""

    def __init__(self, gate: Tensor, up: Tensor, activation: Activation) -> None:
        self._gate, self._up, self._activation = gate, up, activation

    def __call__(self, x: Tensor) -> Tensor:
        return activate(functional.linear(x, self._gate), self._activation) * functional.linear(x, self._up)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply a gate's activation."""
    return functional.silu(x) if activation == "silu" else functional.gelu(x, approximate="tanh")


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The step as it came: nothing is prepared."""

    layout: StepLayout
    slots_T: Tensor
    shape: AttentionShape


class ReferencePrimitives:
    """One request after another, its blocks gathered and masked in full."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.description = f"{str(dtype).removeprefix('torch.')} reference"

    def pack_linear(self, weight: Tensor) -> Linear:
        return PlainLinear(weight.to(self.dtype))

    def pack_gated(self, gate: Tensor, up: Tensor, activation: Activation) -> GatedLinear:
        return PlainGatedLinear(gate.to(self.dtype), up.to(self.dtype), activation)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (normed * weight.float()).to(x.dtype)

    def rotate(self, x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        first, second = x_THD.chunk(2, dim=-1)
        return x_THD * cos_T1D + torch.cat((second, first), dim=-1) * sin_T1D

    def kv_shape(self, num_blocks: int, block_size: int, shape: AttentionShape) -> tuple[int, ...]:
        return num_blocks * block_size, 2, shape.num_kv_heads, shape.head_dim

    def plan(
        self, layout: StepLayout, slots_T: Tensor, block_size: int, shape: AttentionShape
    ) -> tuple[ReferencePlan, int]:
        return ReferencePlan(layout, slots_T, shape), block_size

    def attend(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: Tensor, plan: tuple[ReferencePlan, int]
    ) -> Tensor:
        step, block_size = plan
        cache[step.slots_T, 0] = k_TKD
        cache[step.slots_T, 1] = v_TKD
        layout = step.layout
        outputs = []
        for row, context in enumerate(layout.context_lengths):
            start, end = layout.query_starts[row], layout.query_starts[row + 1]
            blocks = torch.tensor(layout.block_tables[row][: -(-context // block_size)])
            slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:context]
            positions = torch.arange(context - (end - start), context)
            mask = causal_mask(positions, torch.arange(context), layout.window)
            k, v = cache[slots].unbind(1)
            outputs.append(masked_attention(q_THD[start:end], k, v, mask, step.shape))
        return torch.cat(outputs)


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """True where a query sees a key: [num_queries, num_keys]."""
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    return visible & (distance < window) if window else visible


def masked_attention(
    q_NHD: Tensor, k_CKD: Tensor, v_CKD: Tensor, mask: Tensor, shape: AttentionShape
) -> Tensor:
    """Softmax attention of N queries over C keys in float32; each KV head serves H / K heads: [N, H * D]."""
    group = shape.num_heads // shape.num_kv_heads
    k = k_CKD.float().repeat_interleave(group, dim=1)
    v = v_CKD.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,chd->hnc", q_NHD.float(), k) * shape.scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hnc,chd->nhd", weights, v).flatten(1).to(q_NHD.dtype)
