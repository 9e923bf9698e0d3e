"""Hostile and damaged GGUF files: each is a ModelError with a clear message, without a large allocation."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.tiny_models import gguf_file

from headrace.engine.model_files.gguf_header import read_gguf_header
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.errors import ModelError

HUGE = 1 << 60


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(num_tensors: int = 0, num_values: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + body


def array(key: str, item_type: int, count: int, items: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, item_type, count) + items


def tensor(name: str, dims: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    entry = text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return entry + struct.pack("<IQ", type_id, offset)


ONE_UINT = text("k") + struct.pack("<II", 4, 7)
DAMAGED = {
    "empty": (b"", "an empty file"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip archive"),
    "pickle": (b"\x80\x02}q\x00." + bytes(100), "pickle"),
    "safetensors": (struct.pack("<Q", 90) + b'{"a": 1}' + bytes(100), "safetensors"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a GGUF file"),
    "big endian": (b"FUGG" + bytes(20), "big-endian"),
    "only magic": (b"GGUF", "wants 4 bytes"),
    "version 1": (header(version=1), "version 1"),
    "version of the other byte order": (header(version=3 << 24), "not supported"),
    "count of values": (header(num_values=HUGE), f"claims {HUGE} key-values"),
    "count of tensors": (header(num_tensors=HUGE), f"claims {HUGE} tensors"),
    "name length": (header(num_values=1, body=struct.pack("<Q", HUGE) + bytes(20)), f"name of {HUGE} bytes"),
    "name not UTF-8": (header(num_values=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(9)), "not UTF-8"),
    "value type": (header(num_values=1, body=text("k") + struct.pack("<IQ", 99, 0)), "value type 99"),
    "array type": (header(num_values=1, body=array("k", 9, 1, bytes(99))), "value type 9"),
    "array count": (header(num_values=1, body=array("k", 4, HUGE)), f"claims {HUGE} items"),
    "string count": (header(num_values=1, body=array("k", 8, HUGE)), f"claims {HUGE} strings"),
    "string length": (
        header(num_values=1, body=array("k", 8, 1, struct.pack("<Q", HUGE))),
        "leaves the file",
    ),
    "array cut short": (header(num_values=1, body=array("k", 8, 2, text("a") + bytes(7))), "cut short"),
    "key twice": (header(num_values=2, body=ONE_UINT * 2), "occurs twice"),
    "alignment": (
        header(num_values=1, body=text("general.alignment") + struct.pack("<II", 4, 3)),
        "general.alignment",
    ),
    "no dimensions": (header(num_tensors=1, body=tensor("t", []) + bytes(64)), "0 dimensions"),
    "dimensions": (header(num_tensors=1, body=tensor("t", [1] * 9)), "9 dimensions"),
    "zero elements": (header(num_tensors=1, body=tensor("t", [0, 4])), "impossible shape"),
    "rows of part of a block": (
        header(num_tensors=1, body=tensor("t", [33, 4], type_id=2)),
        "impossible shape",
    ),
    "overflowing size": (header(num_tensors=1, body=tensor("t", [1 << 32, 1 << 32])), "ends at byte"),
    "offset": (header(num_tensors=1, body=tensor("t", [4], offset=HUGE)), "ends at byte"),
    "tensor type": (header(num_tensors=1, body=tensor("t", [4], type_id=77)), "type 77"),
    "tensor twice": (header(num_tensors=2, body=tensor("t", [4]) * 2 + bytes(64)), "occurs twice"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_with_its_reason_and_little_memory(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message) as caught:
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            read_gguf_header(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    gguf_file(path)
    return path.read_bytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "cut.gguf"
    for length in random.Random(0).sample(range(len(good)), 60):
        path.write_bytes(good[:length])
        with pytest.raises(ModelError):
            read_metadata(ModelFiles("cut", "gguf", path))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_give_metadata_or_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, data: st.DataObject
) -> None:
    # The header is small, the tensors behind it are of no interest here.
    changed = bytearray(good)
    positions = st.lists(st.integers(0, 4000), min_size=1, max_size=4)
    for position in data.draw(positions):
        changed[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(changed)
    try:
        read_metadata(ModelFiles("flipped", "gguf", path))
    except ModelError:
        pass
