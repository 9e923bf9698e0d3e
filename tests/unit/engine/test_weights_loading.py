"""Loading: damaged numbers, files that change meanwhile, too little memory; packed weights are the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.engine.tiny_models import gguf_file, huggingface_directory
from torch import Tensor

from headrace.engine.model_files.metadata import Hyperparameters, read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.weights import loading
from headrace.engine.weights.loading import Packing, Read, load_tensors
from headrace.engine.weights.names import expected_shapes
from headrace.engine.weights.source import open_weights
from headrace.engine.weights.stamp import stamp_files
from headrace.errors import ModelChanged, ModelError, OutOfMemory


class Rig:
    """A packing that only changes the dtype, and counts."""

    def __init__(self, files: ModelFiles, version: str = "1") -> None:
        self.files = files
        self.num_packed = 0
        self.packing = Packing("float32", version, 4, self._pack)

    def _pack(self, h: Hyperparameters, read: Read) -> dict[str, Tensor]:
        self.num_packed += 1
        return {name: read(name, torch.float32) for name in expected_shapes(h)}

    def load(self, packed_dir: str = "") -> dict[str, Tensor]:
        h = read_metadata(self.files).hyperparameters
        return load_tensors(self.files, h, self.packing, packed_dir, lambda _phase: None)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("make", [gguf_file, huggingface_directory])
def test_packed_weights_are_those_of_the_model(tmp_path: Path, make: object) -> None:
    files = gguf_file(tmp_path / "m.gguf") if make is gguf_file else huggingface_directory(tmp_path / "m")
    rig = Rig(files)
    expected = rig.load()
    packed_dir = str(tmp_path / "packed")
    assert_same(rig.load(packed_dir), expected)
    assert_same(rig.load(packed_dir), expected)
    assert rig.num_packed == 2
    other = Rig(files, version="2")
    assert_same(other.load(packed_dir), expected)
    assert other.num_packed == 1


def test_another_file_of_the_same_name_size_and_time_is_packed_anew(tmp_path: Path) -> None:
    rig = Rig(gguf_file(tmp_path / "m.gguf"))
    packed_dir = str(tmp_path / "packed")
    rig.load(packed_dir)
    times = os.stat(tmp_path / "m.gguf")
    gguf_file(tmp_path / "other.gguf", seed=1)
    (tmp_path / "other.gguf").rename(tmp_path / "m.gguf")
    os.utime(tmp_path / "m.gguf", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (tmp_path / "m.gguf").stat().st_size == times.st_size
    assert_same(rig.load(packed_dir), rig.load())
    assert rig.num_packed == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_with_numbers_that_are_not_finite_is_named(tmp_path: Path, value: float) -> None:
    files = huggingface_directory(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path)
    packed_dir = tmp_path / "packed"
    with pytest.raises(ModelError, match=r"layers\.1\.up holds numbers that are not finite"):
        Rig(files).load(str(packed_dir))
    assert list(packed_dir.glob("*.packed")) == []


def test_a_file_cut_while_it_is_read_is_an_error_and_no_dead_process(tmp_path: Path) -> None:
    files = gguf_file(tmp_path / "m.gguf")
    source = open_weights(files, read_metadata(files).hyperparameters)
    os.truncate(tmp_path / "m.gguf", 5000)
    with pytest.raises(ModelChanged, match="was cut while it was read"):
        source.read("layers.2.down", torch.float32)


def test_a_file_replaced_while_it_is_packed_is_not_kept(tmp_path: Path) -> None:
    files = gguf_file(tmp_path / "m.gguf")
    gguf_file(tmp_path / "other.gguf", seed=1)
    rig = Rig(files)
    pack = rig.packing.pack

    def pack_and_replace(h: Hyperparameters, read: Read) -> dict[str, Tensor]:
        tensors = dict(pack(h, read))
        (tmp_path / "other.gguf").rename(tmp_path / "m.gguf")
        return tensors

    rig.packing = Packing("float32", "1", 4, pack_and_replace)
    with pytest.raises(ModelChanged, match="was changed since this engine began"):
        rig.load(str(tmp_path / "packed"))
    assert list((tmp_path / "packed").glob("*.packed")) == []


def test_too_little_memory_is_known_before_packing_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(gguf_file(tmp_path / "m.gguf"))
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"no memory for the packed weights \(.* KiB\): 1000 B are free"):
        rig.load()
    assert rig.num_packed == 0


def test_an_allocation_that_fails_is_told_as_what_it_is(tmp_path: Path) -> None:
    rig = Rig(gguf_file(tmp_path / "m.gguf"))

    def pack(_h: Hyperparameters, _read: Read) -> dict[str, Tensor]:
        return {"a": torch.empty(1 << 60, dtype=torch.uint8)}

    rig.packing = Packing("float32", "1", 4, pack)
    with pytest.raises(OutOfMemory, match="no memory for the packed weights"):
        rig.load()


def test_a_stamp_tells_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        stamp_files(ModelFiles("m", "gguf", tmp_path / "m.gguf"))
