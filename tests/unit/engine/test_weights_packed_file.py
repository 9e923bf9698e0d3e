"""Packed files: what was written comes back; what is damaged, cut, foreign or impossible is refused."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.weights import packed_file
from headrace.engine.weights.packed_file import ALIGNMENT_BYTES, PackedFileError, map_packed, write_packed
from headrace.engine.weights.packed_tensors import from_raw, to_raw

IDENTITY: dict[str, Any] = {"files": [{"path": "/m.gguf", "size": 3}], "packing": ["int8", "1"]}
TENSORS = {
    "a": torch.arange(100, dtype=torch.int8).view(4, 25),
    "empty": torch.empty(0, 7),
    "scale": torch.tensor(0.5),
    "b": torch.linspace(-1, 1, 33).bfloat16(),
    "table": torch.arange(6).view(1, 2, 3),
}


def write(path: Path, identity: dict[str, Any] = IDENTITY) -> Path:
    with path.open("wb") as file:
        write_packed(file, identity, to_raw(TENSORS))
    path.chmod(0o600)
    return path


def assert_whole(path: Path) -> None:
    found = from_raw(map_packed(path, IDENTITY))
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_come_back_as_they_were_and_aligned(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    assert_whole(path)
    found = from_raw(map_packed(path, IDENTITY))
    assert all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in found.values())
    path.unlink()  # who has it mapped keeps it
    assert torch.equal(found["a"], TENSORS["a"])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m").read_bytes()
    cut = tmp_path / "cut"
    for size in [*range(0, 700, 9), *range(4096, len(whole), 7)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(PackedFileError):
            map_packed(cut, IDENTITY)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(PackedFileError, match="it was cut"):
        map_packed(cut, IDENTITY)


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_of_no_account(
    place: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("packed") / "m")
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        assert_whole(path)  # the space between tensors
    except PackedFileError:
        pass


def test_the_weights_of_another_model_or_version_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {**IDENTITY, "packing": ["int8", "2"]})
    with pytest.raises(PackedFileError, match="another model file, or by another version"):
        map_packed(path, IDENTITY)


def test_what_is_no_private_regular_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"):
        map_packed(tmp_path / "link", IDENTITY)
    with pytest.raises(PackedFileError, match="not a regular file"):
        map_packed(tmp_path, IDENTITY)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PackedFileError, match="not a regular file"):
        map_packed(tmp_path / "pipe", IDENTITY)
    path.chmod(0o602)
    with pytest.raises(PackedFileError, match="may write to it"):
        map_packed(path, IDENTITY)
    with pytest.raises(FileNotFoundError):
        map_packed(tmp_path / "none", IDENTITY)


def forge(path: Path, header: bytes, data_bytes: int = 256) -> Path:
    """A file whose header has the right checksum, whatever it says."""
    head = struct.pack("<8sQ16s", b"hrpack\x01\x00", len(header), xxhash.xxh3_128_digest(header))
    path.write_bytes((head + header).ljust(4096, b"\0") + bytes(data_bytes))
    path.chmod(0o600)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    digest = xxhash.xxh3_128_hexdigest(bytes(64))
    return {"name": "a", "dtype": "int8", "shape": [64], "offset": 0, "size": 64, "digest": digest} | changes


def header(*entries: dict[str, Any], **changes: Any) -> bytes:
    return msgspec.json.encode({"identity": IDENTITY, "num_bytes": 256, "tensors": entries} | changes)


def test_a_forged_header_without_a_fault_would_be_believed(tmp_path: Path) -> None:
    assert list(map_packed(forge(tmp_path / "m", header(entry())), IDENTITY)) == ["a"]


@pytest.mark.parametrize(
    "lie",
    [
        header(entry(shape=[1 << 40])),
        header(entry(shape=[1 << 62, 1 << 62], size=1 << 124)),
        header(entry(shape=[-8, -8])),
        header(entry(shape=[1] * 100_000)),
        header(entry(size=128, shape=[128], offset=192)),
        header(entry(offset=-64)),
        header(entry(offset=3)),
        header(entry(), entry(name="b")),
        header(entry(), entry(offset=64)),
        header(entry(dtype="object")),
        header(entry(dtype="float128")),
        header(entry(digest="")),
        header(entry(), num_bytes=1 << 50),
        header(entry(), extra=1),
        header({}),
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
    ],
)
def test_a_header_that_lies_is_refused_without_allocating_what_it_claims(tmp_path: Path, lie: bytes) -> None:
    path = forge(tmp_path / "m", lie) if len(lie) < 4000 else long(tmp_path / "m", lie)
    tracemalloc.start()
    with pytest.raises(PackedFileError):
        map_packed(path, IDENTITY)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def long(path: Path, lie: bytes) -> Path:
    head = struct.pack("<8sQ16s", b"hrpack\x01\x00", len(lie), xxhash.xxh3_128_digest(lie))
    size = -(-(32 + len(lie)) // 4096) * 4096
    path.write_bytes((head + lie).ljust(size, b"\0") + bytes(256))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "only"),
        (b"hrpack\x02\x00" + bytes(24), "another version's format"),
        (b"GGUF" + bytes(60), "no packed file"),
        (b"hrpack\x01\x00" + b"\xff" * 8 + bytes(16), "claims a header"),
    ],
)
def test_a_foreign_head_is_named(tmp_path: Path, head: bytes, message: str) -> None:
    (tmp_path / "m").write_bytes(head)
    (tmp_path / "m").chmod(0o600)
    with pytest.raises(PackedFileError, match=message):
        map_packed(tmp_path / "m", IDENTITY)


def test_a_full_disk_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _offset: int, _length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size == 0
