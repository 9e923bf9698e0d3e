"""The header of a safetensors file: which tensors it has and where, read with bounds checks, without them.

Our own reader, like that of GGUF: it says what is wrong and what to do, and the tensors' bytes are then read,
not mapped, so that a file that is cut while it is read is an error and no dead process. Format:
https://github.com/huggingface/safetensors#format. Must not know what the tensors are for.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.errors import ModelError

MAX_HEADER_BYTES = 32 << 20
"""Some 200,000 tensors. The format itself allows 100 MB."""
_MAX_DIMENSIONS = 8
_METADATA = "__metadata__"
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""The format's names of element types -> bytes."""


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One entry of the header; its bytes are proven to lie inside the file."""

    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    """From the start of the file."""
    size_bytes: int


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_safetensors_header(path: Path) -> dict[str, SafetensorsTensor]:
    """Return the tensors of the file at `path` by name.

    Raises ModelError when the file is missing, is something else, is cut short, or lies about its lengths.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"{path}: is not a regular file; a .safetensors file is needed")
            header, size = _read(path, descriptor, status.st_size), status.st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _place(path, header, size)


def _read(path: Path, descriptor: int, size: int) -> bytes:
    """Return the header's JSON."""
    head = os.pread(descriptor, 8, 0)
    kind = _foreign_kind(head)
    if kind:
        raise ModelError(f"{path}: damaged or no safetensors file: it is {kind}")
    [length] = struct.unpack("<Q", head)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise _damaged(path, f"it claims a header of {length} bytes and has {size} in all")
    return os.pread(descriptor, length, 8)


def _foreign_kind(head: bytes) -> str:
    if len(head) < 8:
        return "an empty file" if not head else f"a file of {len(head)} bytes"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (perhaps a torch checkpoint, which is pickle and is never loaded)"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which is never loaded because loading it runs its code"
    if head.startswith(b"GGUF"):
        return "a GGUF file; give its path, which must end in .gguf"
    if head.startswith(b"version "):
        return "a pointer of git-lfs; fetch the file itself"
    return ""


def _place(path: Path, header: bytes, size: int) -> dict[str, SafetensorsTensor]:
    """Turn the header into tensors whose bytes lie inside the file and nowhere twice."""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop(_METADATA, None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"its header is {str(error)[:200]}") from None
    start = 8 + len(header)
    tensors = {name: _checked(path, name, entry, start, size) for name, entry in entries.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset_bytes):
        if tensor.offset_bytes < end and tensor.size_bytes:
            raise _damaged(path, f"tensor {_brief(name)} overlaps another")
        end = max(end, tensor.offset_bytes + tensor.size_bytes)
    return tensors


def _checked(path: Path, name: str, entry: _Entry, start: int, size: int) -> SafetensorsTensor:
    if entry.dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise _damaged(path, f"tensor {_brief(name)} has the type {_brief(entry.dtype)}; types are {known}")
    begin, end = entry.data_offsets
    num_bytes = DTYPE_BYTES[entry.dtype]
    for dimension in entry.shape[: _MAX_DIMENSIONS + 1]:
        num_bytes *= dimension
    is_shape = len(entry.shape) <= _MAX_DIMENSIONS and all(dimension >= 0 for dimension in entry.shape)
    if not is_shape or not 0 <= begin <= end or end - begin != num_bytes:
        raise _damaged(
            path,
            f"tensor {_brief(name)} of type {entry.dtype} and shape {_brief(entry.shape)} "
            f"cannot be the bytes {begin} to {end}",
        )
    if start + end > size:
        raise _damaged(
            path,
            f"tensor {_brief(name)} ends at byte {start + end}, and the file has {size}; "
            "it was not copied or downloaded completely",
        )
    return SafetensorsTensor(entry.dtype, tuple(entry.shape), start + begin, num_bytes)


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: damaged or no safetensors file: {what}")


def _brief(value: object) -> str:
    """`value` for a message: a hostile one may be megabytes long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
