"""Hostile and damaged safetensors files: each is a ModelError with its reason, without a large allocation."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from headrace.engine.model_files.safetensors_header import read_safetensors_header
from headrace.errors import ModelError

HUGE = 1 << 60


def file(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (4, 4), begin: Any = 0, end: Any = 64) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty": (b"", "an empty file"),
    "short": (b"1234", "a file of 4 bytes"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip archive.*pickle"),
    "pickle": (b"\x80\x02}q\x00." + bytes(100), "pickle, which is never loaded"),
    "gguf": (b"GGUF" + bytes(100), "a GGUF file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "terabytes of header": (struct.pack("<Q", 1 << 42) + b"{}", f"claims a header of {1 << 42} bytes"),
    "header longer than the file": (struct.pack("<Q", 1 << 20) + b"{}", "claims a header"),
    "no JSON": (file(b"\xff\xfe\x00"), "its header is"),
    "a list": (file(b"[]"), "its header is"),
    "deep JSON": (file(b'{"a":' * 50_000), "its header is"),
    "deep entry": (file(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "its header is"),
    "dtype": (file({"t": entry("F4")}), "has the type 'F4'"),
    "long dtype": (file({"t": entry("x" * 100_000)}), "…"),
    "size": (file({"t": entry(shape=[4, 5])}), "cannot be the bytes 0 to 64"),
    "terabytes": (file({"t": entry(shape=[HUGE // 4], end=HUGE)}), "ends at byte"),
    "beyond 64 bits": (file({"t": entry(shape=[1 << 80], end=1 << 82)}), "damaged"),
    "overflow to zero": (file({"t": entry(shape=[1 << 32, 1 << 32], end=0)}), "cannot be the bytes"),
    "many dimensions": (file({"t": entry(shape=[1] * 100_000, end=4)}), "cannot be the bytes"),
    "negative shape": (file({"t": entry(shape=[-4, -4])}), "cannot be the bytes"),
    "negative offset": (file({"t": entry(begin=-64, end=0)}), "cannot be the bytes"),
    "backwards": (file({"t": entry(begin=64, end=0)}), "cannot be the bytes"),
    "beyond the file": (file({"t": entry(begin=64, end=128)}), "not copied or downloaded completely"),
    "cut": (file({"t": entry()}, bytes(63)), "ends at byte"),
    "overlap": (file({"a": entry(), "b": entry()}), "overlaps another"),
    "float shape": (file({"t": entry(shape=[4.5, 4])}), "its header is"),
    "no offsets": (file({"t": {"dtype": "F32", "shape": [1]}}), "its header is"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_with_its_reason_and_little_memory(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message) as caught:
            read_safetensors_header(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_good_header_gives_places_from_the_start_of_the_file(tmp_path: Path) -> None:
    content = file(
        {"__metadata__": {"format": "pt"}, "t": entry("BF16", [4, 8]), "none": entry(shape=[0], end=0)}
    )
    (tmp_path / "m").write_bytes(content)
    tensors = read_safetensors_header(tmp_path / "m")
    assert tensors["t"].offset_bytes == len(content) - 64
    assert (tensors["t"].shape, tensors["t"].size_bytes, tensors["none"].size_bytes) == ((4, 8), 64, 0)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ModelError, match="not a regular file"):
            read_safetensors_header(path)
    for path in (tmp_path / "none", tmp_path / "loop"):
        with pytest.raises(ModelError, match="cannot be read"):
            read_safetensors_header(path)
