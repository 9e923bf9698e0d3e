"""Tensors of a GGUF file. Owns the mapping to canonical tensors: names, and the order of rotary dimensions.

Must not know what the tensors are for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from headrace.engine.model_files.gguf_header import read_gguf_header
from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.weights.dequantize import dequantize
from headrace.engine.weights.file_bytes import FileBytes
from headrace.engine.weights.names import expected_shapes, gguf_name
from headrace.engine.weights.source import check_tensors
from headrace.errors import ModelError

ROPE_DIVISORS = "rope_freqs.weight"
"""Llama 3's rotary divisors, [head_dim / 2]: optional, the only tensor without a canonical name."""


class GgufSource:
    """Reads tensors one at a time."""

    def __init__(self, path: Path, hyperparameters: Hyperparameters) -> None:
        self._h = hyperparameters
        self._path = path
        self._file = FileBytes(path)
        self._tensors = read_gguf_header(path).tensors
        check_tensors(
            str(path),
            {gguf_name(name): shape for name, shape in expected_shapes(hyperparameters).items()},
            {name: tensor.shape for name, tensor in self._tensors.items()},
            ignored=frozenset({ROPE_DIVISORS}),
        )

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        weight = self._read_file_name(gguf_name(name), dtype)
        part = name.rpartition(".")[2]
        if self._h.architecture == "llama" and part in ("q", "k"):
            return _undo_rotary_permutation(
                weight, self._h.num_heads if part == "q" else self._h.num_kv_heads
            )
        return weight

    def rope_divisors(self) -> Tensor | None:
        """Divisors of the rotary frequencies [head_dim / 2] where the file has them."""
        if ROPE_DIVISORS not in self._tensors:
            return None
        divisors = self._read_file_name(ROPE_DIVISORS, torch.float32)
        if tuple(divisors.shape) != (self._h.head_dim // 2,) or not bool((divisors > 0).all()):
            raise ModelError(
                f"{self._path}: {ROPE_DIVISORS} must be {self._h.head_dim // 2} positive numbers"
            )
        return divisors

    def _read_file_name(self, file_name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors[file_name]
        raw = self._file.read(tensor.offset_bytes, tensor.size_bytes)
        return dequantize(raw, tensor.type_id, tensor.shape, dtype)


def _undo_rotary_permutation(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp stores llama's q and k with rotary pairs interleaved (0, 1, 0, 1…); we rotate halves."""
    out_features, in_features = weight.shape
    pairs = weight.view(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)
