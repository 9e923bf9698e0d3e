"""Memory whose pages become resident only when they are first written, and giving memory back."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

LayerMemory = Callable[[int, int], memoryview]
"""Returns the memory of a layer's keys and values, of so many bytes. Raises MemoryError."""


def own_memory(layer: int, num_bytes: int) -> memoryview:
    """Zeros that end with this process: a mapping of its own, which goes back whole when nothing looks into
    it any more. What comes from an allocator (torch's, calloc's) a second time is written, all of it, to be
    zero. Begins at a page. Raises MemoryError."""
    try:
        return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError(f"layer {layer}, {num_bytes} bytes: {error.strerror or error}") from None


def lazy_cache(memory: LayerMemory, layer: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a layer's memory as a tensor. Unlike torch.zeros, which writes every byte, this leaves zeroing
    to the kernel. Raises MemoryError."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    view = memory(layer, num_bytes)
    assert len(view) == num_bytes, f"layer {layer}: {len(view)} bytes instead of {num_bytes}"
    return torch.frombuffer(view, dtype=dtype).view(shape)


def give_back() -> None:
    """Return freed memory to the system: what nothing refers to any more, and what the allocator keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others give back by themselves
    if trim is not None:
        trim(0)
