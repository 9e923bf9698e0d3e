"""From torch's tensors to the bytes of a packed file, and from mapped bytes to tensors, without a copy.

Must not know files or what the tensors are for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.engine.weights.packed_file import DTYPE_BYTES, RawTensor


def to_raw(tensors: Mapping[str, Tensor]) -> dict[str, RawTensor]:
    """Return the bytes of each tensor, which must be contiguous and on the CPU: views that keep them
    alive."""
    return {name: _to_raw(name, tensor) for name, tensor in tensors.items()}


def from_raw(tensors: Mapping[str, RawTensor]) -> dict[str, Tensor]:
    """Return tensors over the same bytes. Where those are mapped read-only, writing to a tensor ends the
    process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return {name: _from_raw(tensor) for name, tensor in tensors.items()}


def _to_raw(name: str, tensor: Tensor) -> RawTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    assert dtype in DTYPE_BYTES, f"{name} cannot be packed: {dtype}"
    assert tensor.layout == torch.strided, f"{name} cannot be packed: {tensor.layout}"
    assert tensor.is_contiguous(), f"{name} cannot be packed: {tensor.shape} has strides {tensor.stride()}"
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return RawTensor(dtype, tuple(tensor.shape), data)


def _from_raw(raw: RawTensor) -> Tensor:
    dtype = getattr(torch, raw.dtype)
    if not len(raw.data):
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(raw.data, dtype=dtype).view(raw.shape)
