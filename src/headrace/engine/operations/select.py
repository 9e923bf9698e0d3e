"""Picks the arithmetic for this machine and torch. The only place that knows which implementations exist."""

from __future__ import annotations

import torch

from headrace.engine.operations.reference import ReferenceOperations
from headrace.engine.operations.interface import Operations


def select_operations(dtype: torch.dtype, num_threads: int) -> Operations:
    """Return the fastest operations in `dtype` that this torch and processor have."""
    return ReferenceOperations(dtype)
