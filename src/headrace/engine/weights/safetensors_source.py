"""Tensors of a Hugging Face directory: one *.safetensors file, or shards with an index. Never pickle.

Must not know what the tensors are for.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from headrace.engine.model_files.metadata import Hyperparameters
from headrace.engine.model_files.safetensors_header import SafetensorsTensor, read_safetensors_header
from headrace.engine.weights.file_bytes import FileBytes
from headrace.engine.weights.names import expected_shapes, huggingface_name
from headrace.engine.weights.source import check_tensors
from headrace.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 * 1024 * 1024
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsSource:
    """Reads tensors one at a time."""

    def __init__(self, directory: Path, hyperparameters: Hyperparameters) -> None:
        self._h = hyperparameters
        self._directory = directory
        self._where: dict[str, tuple[FileBytes, SafetensorsTensor]] = {}
        for path in _weight_files(directory):
            file = FileBytes(path)
            self._where |= {name: (file, tensor) for name, tensor in read_safetensors_header(path).items()}
        expected = {self._file_name(name): shape for name, shape in expected_shapes(hyperparameters).items()}
        found = {name: tensor.shape for name, (_, tensor) in self._where.items()}
        # A tied model may repeat its embedding as lm_head; old checkpoints carry rotary tables.
        ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
        if hyperparameters.is_tied:
            ignored.add("lm_head.weight")
        check_tensors(str(directory), expected, found, frozenset(ignored))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        file_name = self._file_name(name)
        file, tensor = self._where[file_name]
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"{self._directory}: tensor {file_name} is {tensor.dtype}; supported are {', '.join(_DTYPES)}"
            )
        raw = torch.from_numpy(file.read(tensor.offset_bytes, tensor.size_bytes))
        weight = raw.view(_DTYPES[tensor.dtype]).view(tensor.shape)
        if self._h.is_norm_plus_one and name.endswith("norm"):
            return (weight.float() + 1.0).to(dtype)
        return weight.to(dtype)

    def rope_divisors(self) -> Tensor | None:
        """Never: config.json describes the scaling."""
        return None

    def _file_name(self, canonical: str) -> str:
        return huggingface_name(canonical, self._h.has_post_norms)


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights. An index may name only plain files inside the directory."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if (directory / _INDEX).is_file():
        return _files_of_index(directory)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory}: has only {pickles[0]}, which is Python pickle and is never loaded: loading runs "
            "its code; convert it to safetensors"
        )
    raise ModelError(f"{directory}: has neither {_SINGLE} nor {_INDEX}")


def _files_of_index(directory: Path) -> list[Path]:
    path = directory / _INDEX
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelError(f"{path}: larger than {_MAX_INDEX_BYTES} bytes")
        index = json.loads(path.read_bytes())
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is no index of safetensors shards: {error!r}") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path}: names the shard {name!r}; shards are .safetensors files beside the index"
            )
        if not (directory / name).is_file():
            raise ModelError(f"{directory / name}: missing; {_INDEX} names it")
        files.append(directory / name)
    return files
