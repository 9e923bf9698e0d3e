"""Where tensors come from: one Protocol, and the door that picks the reader for a model's files.

A source hands out one tensor at a time, so that a loader can pack and drop it before it takes the next.
Must not know what tensors are for.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.model_files.resolve import ModelFiles
from headrace.errors import ModelError


class WeightSource(Protocol):
    """The tensors of one model under their canonical names (`names`), checked for presence and shape."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the tensor in `dtype`, with memory of its own. Raises ModelError."""
        ...

    def rope_divisors(self) -> Tensor | None:
        """Divisors of the rotary frequencies [head_dim / 2], where the files carry them as a tensor."""
        ...


def open_weights(files: ModelFiles, hyperparameters: Hyperparameters) -> WeightSource:
    """Open the tensors of `files` and check names and shapes, without reading them.

    Raises ModelError that names missing, extra and mis-shaped tensors.
    """
    if files.format == "gguf":
        from headrace.engine.weights.gguf_source import GgufSource

        return GgufSource(files.path, hyperparameters)
    if files.format == "huggingface":
        from headrace.engine.weights.safetensors_source import SafetensorsSource

        return SafetensorsSource(files.path, hyperparameters)
    raise ModelError(f"model {files.name!r} is {files.format}: it has no weights")


def check_tensors(
    where: str,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    ignored: frozenset[str],
) -> None:
    """Compare the file's own names and shapes. Raises ModelError that lists up to five of each fault."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and name not in ignored]
    shapes = [
        f"{name} is {list(found[name])} and must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("not of this architecture", extra),
            ("wrong shape", shapes),
        )
        if names
    ]
    if problems:
        raise ModelError(f"{where}: the tensors do not fit the model's configuration: {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
