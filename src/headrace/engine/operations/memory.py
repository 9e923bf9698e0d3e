"""Memory whose pages become resident only when they are first written, and giving memory back."""

from __future__ import annotations

import ctypes
import gc
import math

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like torch.zeros, which writes every byte: this leaves zeroing to the kernel (numpy uses calloc).

    Aligned to a cache line.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


def give_back() -> None:
    """Return freed memory to the system: what nothing refers to any more, and what the allocator keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others give back by themselves
    if trim is not None:
        trim(0)
