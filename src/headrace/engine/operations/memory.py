"""Memory whose pages become resident only when they are first written, and giving memory back."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap

import torch
from torch import Tensor


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like torch.zeros, which writes every byte: this leaves zeroing to the kernel. Begins at a page.

    A mapping of its own, which goes back whole when the tensor does: what comes from an allocator (torch's,
    calloc's) a second time is written, all of it, to be zero. Raises MemoryError.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes: {error.strerror or error}") from None
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def give_back() -> None:
    """Return freed memory to the system: what nothing refers to any more, and what the allocator keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others give back by themselves
    if trim is not None:
        trim(0)
