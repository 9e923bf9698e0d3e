"""Fast primitives on CPUs with nothing but torch: oneDNN's packed linears, attention in batched products.

Must not know architectures, requests or files.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headrace.engine.model_files.metadata import Activation
from headrace.engine.operations.cpu_attention import AttentionPlan, Scratch, attend, plan_attention
from headrace.engine.operations.mkldnn_linear import MkldnnGatedLinear, MkldnnLinear
from headrace.engine.operations.reference import PlainGatedLinear, PlainLinear
from headrace.engine.operations.torch_blocks import AttentionShape, GatedLinear, Linear, StepLayout


class CpuPrimitives:
    """bfloat16 or float32. With `is_packed` (bfloat16 only) linears run through oneDNN's packed weights."""

    def __init__(self, dtype: torch.dtype, num_threads: int, *, is_packed: bool) -> None:
        self.dtype = dtype
        self._is_packed = is_packed
        self._scratch = Scratch(dtype)
        threads = f"{num_threads} thread{'s' if num_threads != 1 else ''}"
        self.description = f"{str(dtype).removeprefix('torch.')}{' mkldnn' if is_packed else ''}, {threads}"

    def pack_linear(self, weight: Tensor) -> Linear:
        weight = weight.to(self.dtype)
        return MkldnnLinear(weight) if self._is_packed else PlainLinear(weight)

    def pack_gated(self, gate: Tensor, up: Tensor, activation: Activation) -> GatedLinear:
        gate, up = gate.to(self.dtype), up.to(self.dtype)
        if self._is_packed:
            return MkldnnGatedLinear(gate, up, activation)
        return PlainGatedLinear(gate, up, activation)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        swapped = torch.roll(x_THD, x_THD.shape[-1] // 2, -1)
        return torch.addcmul(x_THD * cos_T1D, swapped, sin_T1D)

    def kv_shape(self, num_blocks: int, block_size: int, shape: AttentionShape) -> tuple[int, ...]:
        return num_blocks, 2, shape.num_kv_heads, block_size, shape.head_dim

    def plan(
        self, layout: StepLayout, slots_T: Tensor, block_size: int, shape: AttentionShape
    ) -> AttentionPlan:
        return plan_attention(layout, slots_T, block_size, shape, self._scratch)

    def attend(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: Tensor, plan: AttentionPlan
    ) -> Tensor:
        return attend(q_THD, k_TKD, v_TKD, cache, plan)
