"""Runs the compiled attention over block tables of a test's choosing, and says what plain torch gives.

Shapes: T tokens of a step, R requests, H heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.engine.operations import torch_blocks
from headrace.engine.operations.kernels import Library, Team
from headrace.engine.operations.reference import ReferencePrimitives, causal_mask, masked_attention

Floats = NDArray[np.float32]
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
EPS = 1e-6
_POINTER = ctypes.c_void_p


class StepStruct(ctypes.Structure):
    """AttentionStep of kernels/attention.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_requests", "block_size", "table_stride")),
        *(
            (name, _POINTER)
            for name in ("query_starts", "context_lengths", "block_tables", "positions", "slots")
        ),
    )


class ShapeStruct(ctypes.Structure):
    """AttentionShape of kernels/attention.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        ("scale", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("kv_kind", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Model:
    """What attention must know of a model, with its norms and rotary angles."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    scale: float = 0.0
    has_norms: bool = False
    block_size: int = 16

    def norms(self) -> tuple[Floats, Floats] | tuple[None, None]:
        if not self.has_norms:
            return None, None
        rng = np.random.default_rng(7)
        q, k = rng.uniform(0.5, 1.5, (2, self.head_dim)).astype(np.float32)
        return q, k

    def angles(self, max_position: int) -> tuple[Floats, Floats]:
        frequencies = 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = np.arange(max_position)[:, None] * frequencies
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    @property
    def factor(self) -> float:
        return self.scale or self.head_dim**-0.5

    @property
    def row(self) -> int:
        """Numbers of a token's q, k and v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Part:
    """One request's share of a step: tokens [start, end) of its context, whose blocks are `blocks`."""

    qkv: Floats
    """[at least end, row]: of the whole context."""
    start: int
    end: int
    blocks: list[int]


class Attention:
    """A model's attention in one layer: KV memory, and steps over it."""

    def __init__(
        self, library: Library, team: Team, model: Model, kind: str, num_blocks: int, max_position: int = 4096
    ) -> None:
        self.model, self.team = model, team
        self._shape = ShapeStruct(
            model.num_heads, model.num_kv_heads, model.head_dim, model.window, model.factor, EPS, KINDS[kind]
        )
        block_bytes = library.function("headrace_kv_block_bytes", [_POINTER, ctypes.c_int], ctypes.c_size_t)
        self.block_bytes: int = block_bytes(ctypes.byref(self._shape), model.block_size)
        assert self.block_bytes, "the kernels do not serve this shape"
        self._memory = np.zeros(num_blocks * self.block_bytes + 64, np.uint8)
        offset = -self._memory.ctypes.data % 64
        self.cache = self._memory[offset : offset + num_blocks * self.block_bytes]
        self._attention = library.function("headrace_attention", [_POINTER] * 10)
        self._cos, self._sin = model.angles(max_position)
        self._norms = model.norms()

    def step(self, parts: list[Part]) -> list[Floats]:
        """Write and attend; per part its rows [end - start, H * D]."""
        arrays, struct = self.layout(parts)
        qkv = np.concatenate([part.qkv[part.start : part.end] for part in parts])
        out = np.full((len(qkv), self.model.num_heads * self.model.head_dim), np.nan, np.float32)
        self.call(struct, qkv, out)
        starts = arrays[0]
        return [out[starts[i] : starts[i + 1]] for i in range(len(parts))]

    def layout(self, parts: list[Part]) -> tuple[list[NDArray[np.int32]], StepStruct]:
        """The step's arrays (to be kept alive) and the struct of pointers to them."""
        block_size = self.model.block_size
        positions = np.concatenate([np.arange(part.start, part.end) for part in parts])
        slots = np.concatenate(
            [
                np.array(part.blocks)[np.arange(part.start, part.end) // block_size] * block_size
                + np.arange(part.start, part.end) % block_size
                for part in parts
            ]
        )
        tables = np.zeros((len(parts), max(len(part.blocks) for part in parts)), np.int32)
        for row, part in enumerate(parts):
            tables[row, : len(part.blocks)] = part.blocks
        starts = np.cumsum([0, *(part.end - part.start for part in parts)])
        contexts = np.array([part.end for part in parts])
        arrays = [
            np.ascontiguousarray(array, np.int32) for array in (starts, contexts, tables, positions, slots)
        ]
        pointers = [array.ctypes.data for array in arrays]
        return arrays, StepStruct(len(positions), len(parts), block_size, tables.shape[1], *pointers)

    def call(self, struct: StepStruct, qkv: Floats, out: Floats) -> None:
        """One call of the compiled function."""
        norms = [None if norm is None else norm.ctypes.data for norm in self._norms]
        self._attention(
            self.team.handle,
            ctypes.byref(self._shape),
            ctypes.byref(struct),
            qkv.ctypes.data,
            *norms,
            self._cos.ctypes.data,
            self._sin.ctypes.data,
            self.cache.ctypes.data,
            out.ctypes.data,
        )


def expected(model: Model, qkv: Floats, start: int, end: int) -> Floats:
    """Rows [start, end) of a whole context's attention by the plain torch operations, in float32."""
    reference = ReferencePrimitives(torch.float32)
    heads = model.num_heads + model.num_kv_heads
    x = torch.from_numpy(qkv[:end]).view(end, -1, model.head_dim)
    qk, v = x[:, :heads], x[:, heads:]
    q_norm, k_norm = model.norms()
    if q_norm is not None and k_norm is not None:
        q = reference.rms_norm(qk[:, : model.num_heads], torch.from_numpy(q_norm), EPS)
        k = reference.rms_norm(qk[:, model.num_heads :], torch.from_numpy(k_norm), EPS)
        qk = torch.cat((q, k), 1)
    cos, sin = (torch.from_numpy(angle)[:end, None] for angle in model.angles(end))
    qk = reference.rotate(qk, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    mask = causal_mask(torch.arange(start, end), torch.arange(end), model.window)
    shape = torch_blocks.AttentionShape(model.num_heads, model.num_kv_heads, model.head_dim, model.factor)
    result: Tensor = masked_attention(
        qk[start:end, : model.num_heads], qk[:, model.num_heads :], v, mask, shape
    )
    return result.numpy()


def random_qkv(model: Model, num_tokens: int, seed: int) -> Floats:
    """q, k and v of a context; the first key draws attention, as in real models."""
    rng = np.random.default_rng(seed)
    qkv = rng.normal(size=(num_tokens, model.row)).astype(np.float32)
    qkv[0, model.num_heads * model.head_dim :] *= 2.0
    return qkv


def exp2(library: Library, x: Floats) -> Floats:
    """2^x as the softmax computes it."""
    y = np.empty_like(x)
    library.function("headrace_attention_exp2", [_POINTER, _POINTER, ctypes.c_int])(
        x.ctypes.data, y.ctypes.data, len(x)
    )
    return y
