"""Picks the arithmetic for this machine and model. The only place that knows which implementations exist."""

from __future__ import annotations

from typing import Literal

import torch

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.operations import mkldnn_linear
from headrace.engine.operations.cpu import CpuPrimitives
from headrace.engine.operations.exchange import Exchange
from headrace.engine.operations.int8 import Int8Operations, why_not_int8
from headrace.engine.operations.interface import Operations
from headrace.engine.operations.kernels import KernelsMissing, load_kernels
from headrace.engine.operations.torch_blocks import TorchOperations
from headrace.errors import ConfigError

_MAX_THREADS = 256
Dtype = Literal["auto", "int8", "bfloat16", "float32"]


def select_operations(
    dtype: Dtype,
    kv_dtype: Dtype,
    num_threads: int,
    h: Hyperparameters,
    exchange: Exchange | None = None,
) -> Operations:
    """Return the operations in `dtype`, with keys and values in `kv_dtype`; auto: the fastest that keep the
    model's quality.

    auto is int8 where there are compiled kernels for this processor's vector instructions, else bfloat16, or
    float32 where the processor has no instructions for bfloat16 (no AVX-512): there emulated bfloat16 is
    several times slower than float32. With `exchange`, those of one rank of several. Raises ConfigError.
    """
    if dtype not in ("auto", "int8"):
        return _torch_operations(dtype, kv_dtype, num_threads, "", exchange)
    try:
        return _int8_operations(kv_dtype, num_threads, h, exchange, is_asked=dtype == "int8")
    except KernelsMissing as missing:
        if dtype == "int8":
            raise ConfigError(
                [f"dtype is int8; it must be auto, bfloat16 or float32 here: {missing}"]
            ) from missing
        return _torch_operations(dtype, kv_dtype, num_threads, f"; {missing}", exchange)


def _int8_operations(
    kv_dtype: Dtype, num_threads: int, h: Hyperparameters, exchange: Exchange | None, *, is_asked: bool
) -> Int8Operations:
    library = load_kernels()
    if reason := why_not_int8(h):
        raise KernelsMissing(reason)
    if library.isa == "portable" and not is_asked:
        raise KernelsMissing("int8 is slower here: the processor has neither AVX2 nor AVX-512 VNNI")
    try:
        kv_kind = "int8" if kv_dtype == "auto" else kv_dtype
        return Int8Operations(library, min(num_threads, _MAX_THREADS), kv_kind, exchange)
    except OSError as error:
        raise ConfigError([str(error)]) from error


def _torch_operations(
    dtype: Dtype, kv_dtype: Dtype, num_threads: int, remark: str, exchange: Exchange | None
) -> Operations:
    is_packed = dtype != "float32" and mkldnn_linear.is_available()
    if dtype == "float32" or (dtype == "auto" and not is_packed):
        primitives = CpuPrimitives(torch.float32, num_threads, is_packed=False)
    else:
        primitives = CpuPrimitives(torch.bfloat16, num_threads, is_packed=is_packed)
    primitives.description += remark
    operations = TorchOperations(primitives, exchange)
    if kv_dtype not in ("auto", operations.arithmetic):
        raise ConfigError(
            [
                f"kv_dtype is {kv_dtype}; with {primitives.description} it must be auto or "
                f"{operations.arithmetic}. Set it to auto, or dtype to int8"
            ]
        )
    return operations
