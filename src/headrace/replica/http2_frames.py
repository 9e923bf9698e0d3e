"""HTTP/2 frames as bytes: their layout, numbers and errors.

Owns the wire format only. Must not know streams, header compression or sockets. Source: RFC 9113, 4 and 6.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

from headrace.errors import HeadraceError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client that knows of HTTP/2 sends first (RFC 9113, 3.4)."""
FRAME_HEADER: Final = struct.Struct(">IBI")
"""Length (24 bits) and type (8 bits) as one number, flags, stream id (its highest bit is unused)."""
HEADER_BYTES: Final = 9
DEFAULT_WINDOW_BYTES: Final = 65_535
DEFAULT_FRAME_BYTES: Final = 16_384
MAX_WINDOW_BYTES: Final = (1 << 31) - 1
STREAM_ID_MASK: Final = (1 << 31) - 1

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

UINT32: Final = struct.Struct(">I")
_SETTING: Final = struct.Struct(">HI")
_GOAWAY: Final = struct.Struct(">II")


class Setting(IntEnum):
    """RFC 9113, 6.5.2. Others are ignored."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    """RFC 9113, 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11
    HTTP_1_1_REQUIRED = 13


class Http2Error(HeadraceError):
    """The peer broke the protocol: its connection ends with `code`."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class StreamError(HeadraceError):
    """The peer broke the protocol in one stream: that stream ends with `code`."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def pack_frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return FRAME_HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def pack_settings(values: dict[Setting, int]) -> bytes:
    return pack_frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in values.items()))


def pack_window_update(stream_id: int, num_bytes: int) -> bytes:
    return pack_frame(WINDOW_UPDATE, 0, stream_id, UINT32.pack(num_bytes))


def pack_reset(stream_id: int, code: ErrorCode) -> bytes:
    return pack_frame(RST_STREAM, 0, stream_id, UINT32.pack(code))


def pack_goaway(last_stream_id: int, code: ErrorCode, message: str = "") -> bytes:
    return pack_frame(GOAWAY, 0, 0, _GOAWAY.pack(last_stream_id, code) + message.encode("utf-8")[:256])


def pack_headers(stream_id: int, block: bytes, *, is_end: bool, max_frame_bytes: int) -> bytes:
    """Return HEADERS, and CONTINUATION frames if `block` is longer than one frame may be."""
    flags = END_STREAM if is_end else 0
    if len(block) <= max_frame_bytes:
        return pack_frame(HEADERS, flags | END_HEADERS, stream_id, block)
    parts = [block[at : at + max_frame_bytes] for at in range(0, len(block), max_frame_bytes)]
    frames = [pack_frame(HEADERS, flags, stream_id, parts[0])]
    frames += [pack_frame(CONTINUATION, 0, stream_id, part) for part in parts[1:-1]]
    frames.append(pack_frame(CONTINUATION, END_HEADERS, stream_id, parts[-1]))
    return b"".join(frames)


def read_settings(payload: bytes) -> Iterable[tuple[int, int]]:
    """Return (setting, value) pairs. Raises Http2Error."""
    if len(payload) % _SETTING.size:
        raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS has {len(payload)} bytes")
    return _SETTING.iter_unpack(payload)


def read_uint32(payload: bytes, name: str) -> int:
    """Return the only number of a RST_STREAM or WINDOW_UPDATE frame. Raises Http2Error."""
    if len(payload) != UINT32.size:
        raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, f"{name} has {len(payload)} bytes; it must have 4")
    number: int = UINT32.unpack(payload)[0]
    return number


def strip_padding(flags: int, payload: bytes) -> bytes:
    """Return the payload of DATA or HEADERS without its padding. Raises Http2Error."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "the padding is longer than the frame")
    return payload[1 : len(payload) - payload[0]]


def strip_priority(flags: int, payload: bytes) -> bytes:
    """Return the header block of HEADERS without the deprecated priority fields. Raises Http2Error."""
    if not flags & HAS_PRIORITY:
        return payload
    if len(payload) < 5:
        raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "HEADERS is too short for its priority fields")
    return payload[5:]
