"""The header of a GGUF file: key-values and the tensor table, read with bounds checks, without the tensors.

Our own reader, because `gguf.GGUFReader` takes 3 s for a 49k vocabulary (one numpy view per string) and
trusts every length in the file; this one takes 0.1 s and never allocates more than the file holds.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
Must not know what the keys mean, nor open the tensors. The file is mapped: replace it by renaming a new one
over it, never by writing into it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 65535
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct code."""

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""ggml tensor type -> (name, elements per block, bytes per block). Others are refused by name."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table; its bytes are proven to lie inside the file."""

    name: str
    shape: tuple[int, ...]
    """Outermost first, as torch and numpy have it (the file stores the reverse)."""
    type_name: str
    type_id: int
    offset_bytes: int
    """From the start of the file."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything before the tensors' data. Arrays are lists of str, int, float or bool."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of the GGUF file at `path`.

    Raises ModelError when the file is missing, is something else, is cut short, or lies about its lengths.
    """
    try:
        with path.open("rb") as file:
            _check_magic(path, file.read(16))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _HeaderReader(path, data).read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_magic(path: Path, head: bytes) -> None:
    if head.startswith(_MAGIC):
        return
    kind = "not a GGUF file"
    if not head:
        kind = "an empty file"
    elif head.startswith(b"PK\x03\x04"):
        kind = "a zip archive (perhaps a torch checkpoint, which is pickle and is never loaded)"
    elif head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = "a Python pickle, which is never loaded because loading it runs its code"
    elif head[8:9] == b"{":
        kind = "a safetensors file; give its directory, with config.json beside it"
    elif head.startswith(b"FUGG"):
        kind = "a big-endian GGUF file"
    raise ModelError(f"{path}: {kind}; a .gguf file begins with the bytes GGUF")


class _HeaderReader:
    """A cursor over the mapped file. Every read checks that the bytes exist before it takes them."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = len(_MAGIC)

    def read(self) -> GgufHeader:
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise self._error(f"GGUF version {version} is not supported; versions 2 and 3 are")
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        # The smallest entries: an empty name (8), a type (4), one byte; and a name, dims, type, offset.
        self._check_count("key-values", num_values, 13)
        self._check_count("tensors", num_tensors, 24)
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._name()
            if key in values:
                raise self._error(f"key {key!r} occurs twice")
            values[key] = self._value(key, self._scalar("I"))
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        return GgufHeader(self._path, values, self._place(entries, values))

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: damaged or unsupported GGUF: {what}")

    def _take(self, num_bytes: int, what: str) -> int:
        """Move past `num_bytes` and return where they begin."""
        at = self._at
        if num_bytes > self._size - at:
            raise self._error(
                f"{what} wants {num_bytes} bytes at offset {at}, and the file has {self._size} bytes in all"
            )
        self._at = at + num_bytes
        return at

    def _check_count(self, what: str, count: int, min_bytes_each: int) -> None:
        if count * min_bytes_each > self._size - self._at:
            raise self._error(f"it claims {count} {what}, which do not fit in its {self._size} bytes")

    def _scalar(self, code: str) -> Any:
        return struct.unpack_from(
            "<" + code, self._data, self._take(struct.calcsize("<" + code), "a number")
        )[0]

    def _name(self) -> str:
        length = self._scalar("Q")
        if length > _MAX_NAME_BYTES:
            raise self._error(f"a name of {length} bytes; at most {_MAX_NAME_BYTES} are allowed")
        at = self._take(length, "a name")
        try:
            return self._data[at : at + length].decode()
        except UnicodeDecodeError:
            raise self._error(f"a name at offset {at} is not UTF-8") from None

    def _value(self, key: str, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self._scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self._strings(key, 1)[0]
        if type_id != _ARRAY:
            raise self._error(f"{key} has the unknown value type {type_id}")
        item_type, count = self._scalar("I"), self._scalar("Q")
        if item_type in _SCALARS:
            code = _SCALARS[item_type]
            self._check_count(f"items in {key}", count, struct.calcsize("<" + code))
            at = self._take(count * struct.calcsize("<" + code), key)
            return list(struct.unpack_from(f"<{count}{code}", self._data, at))
        if item_type == _STRING:
            self._check_count(f"strings in {key}", count, 8)
            return self._strings(key, count)
        raise self._error(f"{key} is an array of the unsupported value type {item_type}")

    def _strings(self, key: str, count: int) -> list[str]:
        """Read strings one after another. The hot loop: 100k of them in a tokenizer.

        Bytes that are not UTF-8 (some vocabularies have them) become U+FFFD.
        """
        data, at, size = self._data, self._at, self._size
        length_at: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            if at + 8 > size:
                raise self._error(f"{key} is cut short at offset {at}")
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > size:
                raise self._error(
                    f"a string of {at - start} bytes in {key} at offset {start} leaves the file"
                )
            strings.append(data[start:at].decode("utf-8", "replace"))
        self._at = at
        return strings

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name()
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._error(
                f"tensor {name!r} has {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are allowed"
            )
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], values: dict[str, Any]
    ) -> dict[str, GgufTensor]:
        """Turn table entries into tensors whose bytes lie inside the file."""
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8 or alignment > 1 << 20:
            raise self._error(f"general.alignment is {alignment!r}; it must be a multiple of 8")
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in entries:
            if name in tensors:
                raise self._error(f"tensor {name!r} occurs twice")
            tensors[name] = self._checked(name, shape, type_id, data_start + offset)
        end = data_start
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset_bytes):
            if tensor.offset_bytes < end:  # else a small file could claim as much memory as it has names
                raise self._error(f"tensor {tensor.name!r} overlaps another")
            end = tensor.offset_bytes + tensor.size_bytes
        return tensors

    def _checked(self, name: str, shape: tuple[int, ...], type_id: int, offset_bytes: int) -> GgufTensor:
        if type_id not in TENSOR_TYPES:
            supported = ", ".join(type_name for type_name, _, _ in TENSOR_TYPES.values())
            raise self._error(f"tensor {name!r} has the type {type_id}; supported are {supported}")
        type_name, block_elements, block_bytes = TENSOR_TYPES[type_id]
        num_elements = 1
        for dimension in shape:
            num_elements *= dimension
        if num_elements == 0 or shape[-1] % block_elements:
            raise self._error(f"tensor {name!r} of type {type_name} has the impossible shape {list(shape)}")
        size_bytes = num_elements // block_elements * block_bytes
        if offset_bytes + size_bytes > self._size:
            raise self._error(
                f"tensor {name!r} ends at byte {offset_bytes + size_bytes}, and the file has {self._size}; "
                "it was not copied or downloaded completely"
            )
        return GgufTensor(name, shape, type_name, type_id, offset_bytes, size_bytes)
