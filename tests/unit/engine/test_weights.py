"""Weights: every quantisation against gguf's own; files with missing, extra and mis-shaped tensors."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.engine.tiny_models import gguf_file, huggingface_directory

from headrace.engine.model_files.gguf_header import TENSOR_TYPES
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.naive import NaiveModel
from headrace.engine.weights.dequantize import dequantize
from headrace.engine.weights.source import WeightSource, open_weights
from headrace.errors import ModelError


def open_files(files: ModelFiles) -> WeightSource:
    return open_weights(files, read_metadata(files).hyperparameters)


@pytest.mark.parametrize("type_id", TENSOR_TYPES, ids=[name for name, _, _ in TENSOR_TYPES.values()])
def test_dequantised_values_equal_those_of_the_gguf_package(type_id: int) -> None:
    name, block_elements, block_bytes = TENSOR_TYPES[type_id]
    shape = (6, 2 * block_elements)
    rng = np.random.default_rng(type_id)
    # Random bytes: some scales are infinite or no number, in both.
    raw = rng.integers(0, 256, (6, 2 * block_bytes), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType(type_id)
    assert gguf.GGML_QUANT_SIZES[kind] == (block_elements, block_bytes)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(np.array(gguf.dequantize(raw, kind), np.float32)).view(shape)
        found = dequantize(raw.reshape(-1), type_id, shape, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_a_quantised_file_is_near_its_original(tmp_path: Path, quantization: str) -> None:
    tokens = list(range(20))
    original = NaiveModel(gguf_file(tmp_path / "f32.gguf", hidden_size=64)).logits(tokens)
    found = NaiveModel(gguf_file(tmp_path / "q.gguf", quantization=quantization)).logits(tokens)
    error = float((found - original).norm() / original.norm())
    assert 0 < error < {"F16": 0.01, "BF16": 0.1, "Q8_0": 0.1, "Q4_1": 0.9}[quantization]


def test_a_weight_read_twice_is_the_same_and_owns_its_memory(tmp_path: Path) -> None:
    source = open_files(gguf_file(tmp_path / "m.gguf"))
    first = source.read("layers.0.gate", torch.float32)
    again = first.clone()
    first.zero_()
    assert torch.equal(source.read("layers.0.gate", torch.float32), again)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    files = huggingface_directory(tmp_path)
    expected = open_files(files).read("layers.1.down", torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    shard(tmp_path, tensors)
    assert torch.equal(open_files(files).read("layers.1.down", torch.float32), expected)


def shard(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Split into two shards with an index, and remove the single file. Returns the index's weight map."""
    names = sorted(tensors)
    where = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no index"),
        (b"[]", "no index"),
        (b'{"weight_map": 3}', "no index"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', "beside the index"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "beside the index"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "beside the index"),
        (b'{"weight_map": {"a": "model-00009.safetensors"}}', "missing"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    files = huggingface_directory(tmp_path)
    shard(tmp_path, load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_files(files)


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    files = huggingface_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.experts.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(63)
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        open_files(files)
    message = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.weight" in message
    assert "not of this architecture: model.layers.0.mlp.experts.weight" in message
    assert "model.norm.weight is [63] and must be [64]" in message


def test_a_tied_model_may_repeat_its_embedding_as_head(tmp_path: Path) -> None:
    files = huggingface_directory(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    assert open_files(files).read("embedding", torch.float32).shape == (96, 64)


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    files = huggingface_directory(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is I32; supported are F32, F16, BF16"):
        open_files(files).read("final_norm", torch.float32)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"PK\x03\x04" + bytes(50), (1 << 60).to_bytes(8, "little")]
)
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    files = huggingface_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="damaged or no safetensors"):
        open_files(files)


def test_a_safetensors_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    files = huggingface_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or no safetensors"):
        open_files(files)


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    files = huggingface_directory(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*pickle.*never loaded"):
        open_files(files)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        open_files(files)
