"""Int8 through the compiled kernels: weights and activations in bytes, exact sums (`kernels/matrix.h`).

Owns the packed layout and what the C++ structures look like from Python. A row's logits are the same bits
whatever else is in the step. Must not know requests or files.

Shapes: T tokens of a step, R requests, S rows sampled, D head_dim. Panels are 32 output channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.models.rotary import RotaryTable
from headrace.engine.operations.exchange import LATE, LOST, Exchange, part_pointer
from headrace.engine.operations.interface import Read, check_packed, read_rows
from headrace.engine.operations.kernel_structures import (
    AttentionBlock,
    AttentionShape,
    AttentionStep,
    Matrix,
    MlpBlock,
)
from headrace.engine.operations.kernels import Library
from headrace.engine.operations.memory import LayerMemory, lazy_cache, own_memory
from headrace.engine.operations.shard import Shard, whole
from headrace.engine.protocol import StepInput, padded_tables

_PANEL = 32
_GATE_CHANNELS = 16
"""gate and up alternate in runs of so many channels, half a panel."""
_MAX_FEATURES = 65536
_MAX_HEAD_DIM = 256
_FEATURE_MULTIPLE = 16
_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "post_attention_norm", "post_mlp_norm")


def why_not_int8(h: Hyperparameters) -> str:
    """Why a model of these sizes cannot be computed in int8; empty when it can."""
    for name, size in (
        ("hidden_size", h.hidden_size),
        ("intermediate_size", h.intermediate_size),
        ("num_heads * head_dim", h.num_heads * h.head_dim),
    ):
        if size % _FEATURE_MULTIPLE or size > _MAX_FEATURES:
            return f"{name} is {size}; int8 needs a multiple of {_FEATURE_MULTIPLE}, at most {_MAX_FEATURES}"
    return ""


KvKind = Literal["float32", "bfloat16", "int8"]
_KV_KINDS: dict[KvKind, int] = {"float32": 0, "bfloat16": 1, "int8": 2}


class Int8Operations:
    """Operations in C++. Owns a team of threads for as long as it or its blocks live."""

    arithmetic = "int8"
    bytes_per_weight = 1.05

    def __init__(
        self,
        library: Library,
        num_threads: int,
        kv_kind: KvKind = "bfloat16",
        exchange: Exchange | None = None,
    ) -> None:
        """With `exchange`, one rank of several. Raises OSError when there are no more threads."""
        self.library = library
        self.exchange = exchange
        self.shard_name = "" if exchange is None else exchange.shard.name
        self.packed_version = f"1-{library.built_from}"
        self._kv_kind = kv_kind
        self.kv_content = f"int8 {library.isa} {kv_kind} {library.built_from}"
        self._kv_block_bytes = library.function("headrace_kv_block_bytes", [c_void_p, c_int], c_size_t)
        self.team = library.start_team(num_threads)
        threads = f"{num_threads} thread{'s' if num_threads != 1 else ''}"
        self.description = f"int8 {library.isa}, {threads}"
        self._pack = library.function("headrace_pack", [c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p])

    def pack(self, h: Hyperparameters, read: Read) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        read = read_rows(read, self.shard(h))

        def matrix(name: str, weight: Tensor) -> None:
            tensors[name], tensors[name + ".scale"] = self.pack_matrix(weight)

        def get(name: str) -> Tensor:
            return read(name, torch.float32)

        matrix("embedding", get("embedding"))
        for index in range(h.num_layers):
            at = f"layers.{index}."
            matrix(at + "qkv", torch.cat([get(at + part) for part in "qkv"]))
            matrix(at + "o", get(at + "o"))
            runs = (-1, _GATE_CHANNELS, h.hidden_size)
            gate, up = get(at + "gate").view(runs), get(at + "up").view(runs)
            matrix(at + "gate_up", torch.stack((gate, up), 1).view(-1, h.hidden_size))
            matrix(at + "down", get(at + "down"))
        for name in _vectors(h):
            tensors[name] = get(name).contiguous()
        if not h.is_tied:
            matrix("output", get("output"))
        return tensors

    def shard(self, h: Hyperparameters) -> Shard:
        """What is computed here."""
        return whole(h) if self.exchange is None else self.exchange.shard

    def pack_matrix(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Pack float32 [out_features, in_features]: bytes [panels, in_features / 4, 32, 4] and float32 scales
        [panels * 32]."""
        out_features, in_features = weight.shape
        weight = weight.float().contiguous()
        panels = -(-out_features // _PANEL)
        packed = torch.empty((panels, in_features // 4, _PANEL, 4), dtype=torch.uint8)
        scale = torch.empty(panels * _PANEL)
        self._pack(
            self.team.handle,
            weight.data_ptr(),
            in_features,
            out_features,
            packed.data_ptr(),
            scale.data_ptr(),
        )
        return packed, scale

    def load(self, h: Hyperparameters, tensors: Mapping[str, Tensor], max_context_tokens: int) -> Int8Blocks:
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, (out_features, in_features) in _matrices(h, self.shard(h)).items():
            panels = -(-out_features // _PANEL)
            expected[name] = ((panels, in_features // 4, _PANEL, 4), torch.uint8)
            expected[name + ".scale"] = ((panels * _PANEL,), torch.float32)
        expected |= {name: ((size,), torch.float32) for name, size in _vectors(h).items()}
        check_packed(expected, tensors)
        return Int8Blocks(h, tensors, self, max_context_tokens)

    def num_kv_heads(self, h: Hyperparameters) -> int:
        return len(self.shard(h).kv_heads)

    def kv_block_bytes(self, h: Hyperparameters, block_size: int) -> int:
        return h.num_layers * self.kv_layer_block_bytes(h, block_size)

    def kv_layer_block_bytes(self, h: Hyperparameters, block_size: int) -> int:
        """Bytes of one block in one layer."""
        num_bytes: int = self._kv_block_bytes(byref(self.attention_shape(h, 0)), block_size)
        assert num_bytes, f"attention cannot serve {h.head_dim=}, {block_size=}"
        return num_bytes

    def attention_shape(self, h: Hyperparameters, layer: int) -> AttentionShape:
        """What attention in `layer` must know."""
        slides = bool(h.sliding_window and h.is_sliding_by_layer and h.is_sliding_by_layer[layer])
        shard = self.shard(h)
        return AttentionShape(
            len(shard.heads),
            len(shard.kv_heads),
            h.head_dim,
            h.sliding_window if slides else 0,
            h.attention_scale or h.head_dim**-0.5,
            h.norm_eps,
            _KV_KINDS[self._kv_kind],
        )


def _matrices(h: Hyperparameters, shard: Shard) -> dict[str, tuple[int, int]]:
    """Name -> (out_features, in_features) of every packed matrix."""
    num_qkv_heads = len(shard.heads) + 2 * len(shard.kv_heads)
    shapes = {"embedding": (len(shard.vocab), h.hidden_size)}
    for index in range(h.num_layers):
        at = f"layers.{index}."
        shapes[at + "qkv"] = (num_qkv_heads * h.head_dim, h.hidden_size)
        shapes[at + "o"] = (len(shard.hidden), h.num_heads * h.head_dim)
        shapes[at + "gate_up"] = (2 * len(shard.inner), h.hidden_size)
        shapes[at + "down"] = (len(shard.hidden), h.intermediate_size)
    if not h.is_tied:
        shapes["output"] = (len(shard.vocab), h.hidden_size)
    return shapes


def _vectors(h: Hyperparameters) -> dict[str, int]:
    """Name -> size of every norm."""
    sizes = {"attention_norm": h.hidden_size, "mlp_norm": h.hidden_size}
    if h.has_qk_norm:
        sizes |= {"q_norm": h.head_dim, "k_norm": h.head_dim}
    if h.has_post_norms:
        sizes |= {"post_attention_norm": h.hidden_size, "post_mlp_norm": h.hidden_size}
    shapes = {f"layers.{index}.{name}": size for index in range(h.num_layers) for name, size in sizes.items()}
    return shapes | {"final_norm": h.hidden_size}


@dataclass(frozen=True, slots=True)
class _Step:
    token_ids_T: Any
    attention: AttentionStep
    kept: tuple[Any, ...]
    """What `attention` points to."""


class Int8Blocks:
    """A model's packed weights and the memory its blocks compute in."""

    def __init__(
        self,
        h: Hyperparameters,
        tensors: Mapping[str, Tensor],
        operations: Int8Operations,
        max_context_tokens: int,
    ) -> None:
        self._h = h
        self._kept = dict(tensors)
        self._operations, self._team = operations, operations.team
        self._exchange, self._shard = operations.exchange, operations.shard(h)
        self._part = part_pointer(self._exchange)
        self._shapes = _matrices(h, self._shard)
        library = operations.library
        self._declare(library)
        self._workspace = c_void_p(library.function("headrace_workspace_new", [], c_void_p)())
        self._free = library.function("headrace_workspace_free", [c_void_p])
        if not self._workspace.value:
            raise MemoryError("no memory for the kernels' workspace")
        self._embedding = self._matrix("embedding")
        self._head = self._embedding if h.is_tied else self._matrix("output")
        rotary = self._rotary_tables(max_context_tokens)
        self._attention_blocks = [self._attention_block(index, rotary) for index in range(h.num_layers)]
        self._mlp_blocks = [self._mlp_block(index) for index in range(h.num_layers)]
        self._block_size = 0
        self._x = torch.empty(0)
        self._logits = torch.empty(0)

    def __del__(self) -> None:
        if getattr(self, "_workspace", None):
            self._free(self._workspace)

    def _declare(self, library: Library) -> None:
        pointer = c_void_p
        self._embed = library.function("headrace_embed", [pointer] * 3 + [c_int, c_int, c_float, pointer])
        self._attend = library.function("headrace_attention_block", [pointer] * 7, c_int)
        self._mlp = library.function("headrace_mlp_block", [pointer] * 3 + [c_int, pointer, pointer], c_int)
        self._head_rows = library.function(
            "headrace_head", [pointer] * 3 + [c_float, pointer, c_int, pointer, pointer, c_int64], c_int
        )

    def _pointer(self, name: str) -> int | None:
        tensor = self._kept.get(name)
        return None if tensor is None else tensor.data_ptr()

    def _matrix(self, name: str) -> Matrix:
        out_features, in_features = self._shapes[name]
        return Matrix(self._pointer(name), self._pointer(name + ".scale"), in_features, out_features)

    def _rotary_tables(self, max_context_tokens: int) -> dict[bool, tuple[int, int]]:
        """Pointers to cos and sin [max_context_tokens, D / 2], by whether a layer slides."""
        h = self._h
        tables: dict[bool, tuple[int, int]] = {}
        full = RotaryTable(h.head_dim, h.rope_theta, h.rope_scaling, self._kept.get("rope_divisors"))
        sliding = RotaryTable(h.head_dim, h.rope_theta_sliding) if h.rope_theta_sliding else full
        for kind, table in ((False, full), (True, sliding)):
            if table is full and kind:
                tables[kind] = tables[False]
                continue
            angles = table.angles(torch.arange(max_context_tokens))
            cos, sin = angles.cos(), angles.sin()
            self._kept |= {f"cos {kind}": cos, f"sin {kind}": sin}
            tables[kind] = (cos.data_ptr(), sin.data_ptr())
        return tables

    def _attention_block(self, index: int, rotary: dict[bool, tuple[int, int]]) -> AttentionBlock:
        h, at = self._h, f"layers.{index}."
        shape = self._operations.attention_shape(h, index)
        return AttentionBlock(
            self._pointer(at + "attention_norm"),
            self._matrix(at + "qkv"),
            self._pointer(at + "q_norm"),
            self._pointer(at + "k_norm"),
            self._matrix(at + "o"),
            self._pointer(at + "post_attention_norm"),
            *rotary[bool(shape.window)],
            shape,
        )

    def _mlp_block(self, index: int) -> MlpBlock:
        h, at = self._h, f"layers.{index}."
        return MlpBlock(
            self._pointer(at + "mlp_norm"),
            self._matrix(at + "gate_up"),
            self._matrix(at + "down"),
            self._pointer(at + "post_mlp_norm"),
            h.norm_eps,
            h.activation == "gelu_tanh",
        )

    def new_kv_caches(
        self, num_blocks: int, block_size: int, memory: LayerMemory = own_memory
    ) -> list[Tensor]:
        h = self._h
        self._block_size = block_size
        num_bytes = num_blocks * self._operations.kv_layer_block_bytes(h, block_size)
        return [lazy_cache(memory, layer, (num_bytes,), torch.uint8) for layer in range(h.num_layers)]

    def prepare(self, batch: StepInput) -> _Step:
        tables = padded_tables(batch.block_tables)
        arrays = (batch.query_starts, batch.context_lengths_R, tables, batch.positions_T, batch.slots_T)
        step = AttentionStep(
            len(batch.token_ids_T),
            tables.shape[0],
            self._block_size,
            tables.shape[1],
            *(array.ctypes.data for array in arrays),
        )
        return _Step(batch.token_ids_T, step, arrays)

    def embed(self, step: _Step) -> Tensor:
        num_rows = len(step.token_ids_T)
        if self._x.shape[0] < num_rows:
            self._x = torch.empty((num_rows, self._h.hidden_size))
        x = self._x[:num_rows]
        # Of several ranks each knows some tokens' embeddings.
        rows = x if self._exchange is None else self._exchange.rows("output", num_rows, x.shape[1])
        self._embed(
            self._team.handle,
            byref(self._embedding),
            step.token_ids_T.ctypes.data,
            self._shard.vocab.start,
            num_rows,
            self._h.embedding_scale,
            rows.data_ptr(),
        )
        if self._exchange is not None:
            self._exchange.share_rows(rows, step.token_ids_T)
            x.copy_(rows)
        return x

    def attend(self, layer: int, x: Tensor, step: _Step, cache: Tensor) -> Tensor:
        block = self._attention_blocks[layer]
        self._check(
            self._attend(
                self._team.handle,
                self._workspace,
                byref(block),
                byref(step.attention),
                cache.data_ptr(),
                x.data_ptr(),
                self._part,
            )
        )
        return x

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self._mlp_blocks[layer]
        team, workspace = self._team.handle, self._workspace
        self._check(self._mlp(team, workspace, byref(block), x.shape[0], x.data_ptr(), self._part))
        return x

    def head(self, x: Tensor) -> Tensor:
        logits = self._logit_rows(x.shape[0])
        self._check(
            self._head_rows(
                self._team.handle,
                self._workspace,
                self._pointer("final_norm"),
                self._h.norm_eps,
                byref(self._head),
                x.shape[0],
                x.data_ptr(),
                logits.data_ptr() + logits.element_size() * self._shard.vocab.start,
                self._h.vocab_size,
            )
        )
        if self._exchange is not None:
            self._exchange.share_columns("logits", logits)
        return logits

    def _logit_rows(self, num_rows: int) -> Tensor:
        size = self._h.vocab_size
        if self._exchange is not None:
            return self._exchange.rows("logits", num_rows, size)
        if self._logits.shape[0] < num_rows:
            self._logits = torch.empty((num_rows, size))
        return self._logits[:num_rows]

    def _check(self, status: int) -> None:
        if status == 0:
            return
        if status in (LOST, LATE) and self._exchange is not None:
            self._exchange.check(status)
        raise MemoryError("no memory for a step; set token_budget to fewer tokens")
