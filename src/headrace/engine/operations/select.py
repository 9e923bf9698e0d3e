"""Picks the arithmetic for this machine and torch. The only place that knows which implementations exist."""

from __future__ import annotations

from typing import Literal

import torch

from headrace.engine.operations import mkldnn_linear
from headrace.engine.operations.cpu import CpuOperations
from headrace.engine.operations.interface import Operations
from headrace.errors import ConfigError


def select_operations(dtype: Literal["auto", "int8", "bfloat16", "float32"], num_threads: int) -> Operations:
    """Return the fastest operations in `dtype` that this torch and processor have.

    auto: bfloat16, or float32 where the processor has no instructions for bfloat16 (no AVX-512): there
    emulated bfloat16 is several times slower than float32. Raises ConfigError.
    """
    if dtype == "int8":
        raise ConfigError(["dtype is int8; it must be auto, bfloat16 or float32 on this machine"])
    is_packed = dtype != "float32" and mkldnn_linear.is_available()
    if dtype == "float32" or (dtype == "auto" and not is_packed):
        return CpuOperations(torch.float32, num_threads, is_packed=False)
    return CpuOperations(torch.bfloat16, num_threads, is_packed=is_packed)
