"""From a model's files to packed tensors: out of the packed cache, or read, checked, packed and kept there.

Owns what makes packed weights those of this model: the files' stamps, the arithmetic, the version of its
layout. Must not know what the tensors are for, nor how they are packed (`Pack`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import headrace
from headrace.engine.kv_memory import free_memory_bytes
from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.weights.names import expected_shapes
from headrace.engine.weights.packed_cache import PackedCache, packed_name
from headrace.engine.weights.packed_file import RawTensor
from headrace.engine.weights.packed_tensors import from_raw, to_raw
from headrace.engine.weights.source import WeightSource, open_weights
from headrace.engine.weights.stamp import stamp_files
from headrace.errors import ModelChanged, ModelError, OutOfMemory
from headrace.units import format_bytes

ROPE_DIVISORS = "rope_divisors"
"""Name of the rotary divisors among packed tensors, for models whose files carry them."""
OnPhase = Callable[[str], None]
Read = Callable[[str, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class Packing:
    """How weights are packed: what must be the same for packed weights to be used again."""

    arithmetic: str
    """`int8`, `bfloat16`, `float32`: each has a file of its own."""
    version: str
    """Of the layout: another one replaces the file."""
    bytes_per_weight: float
    """About; to know before packing whether memory is enough."""
    pack: Callable[[Hyperparameters, Read], Mapping[str, Tensor]]
    """Reads canonical tensors and returns contiguous ones, under names of its own."""


def load_tensors(
    files: ModelFiles, h: Hyperparameters, packing: Packing, packed_dir: str, on_phase: OnPhase
) -> dict[str, Tensor]:
    """Return the packed tensors of a model, and its rotary divisors if it has some.

    Those out of `packed_dir` are mapped read-only and shared with other engines. Raises ModelError for files
    that cannot be served, ModelChanged if they changed meanwhile, OutOfMemory.
    """

    def pack() -> dict[str, RawTensor]:
        return to_raw(pack_weights(files, h, packing))

    if not packed_dir:
        on_phase("packing weights")
        return pack_weights(files, h, packing)
    stamps = stamp_files(files)
    identity = {
        "headrace": headrace.__version__,
        "packing": [packing.arithmetic, packing.version],
        "files": stamps,
    }
    name = packed_name(str(files.path), packing.arithmetic)
    return from_raw(PackedCache(Path(packed_dir), _say).load(name, identity, pack, on_phase))


def pack_weights(files: ModelFiles, h: Hyperparameters, packing: Packing) -> dict[str, Tensor]:
    """Read, check and pack all weights. Raises as `load_tensors`."""
    stamps = stamp_files(files)
    source = open_weights(files, h)
    num_weights = sum(math.prod(shape) for shape in expected_shapes(h).values())
    check_free(int(num_weights * packing.bytes_per_weight), "the packed weights")
    try:
        tensors = dict(packing.pack(h, FiniteReader(files, source)))
        divisors = source.rope_divisors()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise _out_of_memory("the packed weights", free_memory_bytes()) from error
        raise
    if divisors is not None:
        tensors[ROPE_DIVISORS] = divisors
    check_unchanged(files, stamps)
    return tensors


def check_unchanged(files: ModelFiles, stamps: list[dict[str, Any]]) -> None:
    """Raise ModelChanged unless the files are those that were stamped."""
    if stamp_files(files) != stamps:
        raise ModelChanged(
            f"{files.path}: was changed since this engine began to read it. Start the replica again to serve "
            "the new one, and replace a model file by renaming another over it"
        )


def check_free(num_bytes: int, what: str) -> None:
    """Raise OutOfMemory unless `num_bytes` are free for `what`."""
    free_bytes = free_memory_bytes()
    if num_bytes > free_bytes:
        raise _out_of_memory(f"{what} ({format_bytes(num_bytes)})", free_bytes)


def _out_of_memory(what: str, free_bytes: int) -> OutOfMemory:
    return OutOfMemory(
        f"there is no memory for {what}: {format_bytes(free_bytes)} are free. "
        "Stop other programs or replicas, or serve a smaller model"
    )


class FiniteReader:
    """Reads canonical tensors and refuses those that hold NaN or infinity: quantised, they would look
    sound."""

    def __init__(self, files: ModelFiles, source: WeightSource) -> None:
        self._path = files.path
        self._source = source

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._source.read(name, dtype)
        least, most = torch.aminmax(tensor)
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ModelError(
                f"{self._path}: the tensor {name} holds numbers that are not finite (in {_name(dtype)}); "
                "the file is damaged, or its numbers do not fit into this dtype: set dtype to float32"
            )
        return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(line: str) -> None:
    print(f"engine: {line}", file=sys.stderr, flush=True)
