"""SPOP 2.0, the protocol between HAProxy and an agent: frames in, frames out, as pure functions on bytes.

Source: HAProxy's doc/SPOE.txt (2.8). Every length is checked against the bytes that are there, so a
truncated or lying frame gives ProtocolError, never a hang, a huge allocation or an IndexError.
Must not know sockets, or what the arguments mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from headrace.errors import ProtocolError

SpopValue = None | bool | int | bytes

MAX_FRAME_BYTES = 65_536
"""Largest frame that we announce and accept, without its 4 bytes of length."""
MIN_FRAME_BYTES = 256
"""Smallest max-frame-size that the protocol allows an engine to announce."""
MAX_VARINT_BYTES = 10
"""A 64-bit integer takes at most this many bytes."""

HAPROXY_HELLO, HAPROXY_DISCONNECT, NOTIFY = 1, 2, 3
AGENT_HELLO, AGENT_DISCONNECT, ACK = 101, 102, 103

_FIN = b"\x00\x00\x00\x01"
_FLAG_FIN, _FLAG_ABORT = 1, 2
_ACK_HEAD = bytes((ACK,)) + _FIN
_SMALL = [bytes((value,)) for value in range(240)]
"""Integers below 240 are one byte: nearly all that are written."""
_STRING, _UINT32 = b"\x08", b"\x03"
_SET_VARIABLE_IN_TRANSACTION = b"\x01\x03\x02"  # action set-var, three arguments, scope txn


class Frame(NamedTuple):
    """One frame: its kind (NOTIFY, ...), the stream and frame ids to answer with, and the rest."""

    kind: int
    stream_id: int
    frame_id: int
    is_aborted: bool
    payload: bytes


class Hello(NamedTuple):
    """What HAProxy says first."""

    max_frame_bytes: int
    is_healthcheck: bool


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return (value, next offset). Raises ProtocolError."""
    try:
        value = data[offset]
        if value < 240:
            return value, offset + 1
        byte = data[offset + 1]
        value += byte << 4
        if byte < 128:
            return value, offset + 2
        for place in range(2, MAX_VARINT_BYTES):
            byte = data[offset + place]
            value += byte << (7 * place - 3)
            if byte < 128:
                if value >= 1 << 64:
                    break
                return value, offset + place + 1
    except IndexError:
        raise ProtocolError("a SPOP integer is cut off") from None
    raise ProtocolError("a SPOP integer has more than 64 bits")


def write_varint(value: int) -> bytes:
    """Return `value` (0 to 2^64 - 1) as SPOP's variable-length integer."""
    if value < 240:
        return _SMALL[value]
    out = bytearray((value & 0xFF | 0xF0,))
    value = (value - 240) >> 4
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value = (value - 128) >> 7
    out.append(value)
    return bytes(out)


def read_string(data: bytes, offset: int) -> tuple[bytes, int]:
    """Return (bytes, next offset). Raises ProtocolError when the length reaches past the end."""
    length, offset = read_varint(data, offset)
    end = offset + length
    if end > len(data):
        raise ProtocolError(f"a SPOP string announces {length} bytes; {len(data) - offset} are left")
    return data[offset:end], end


def write_string(value: bytes) -> bytes:
    return write_varint(len(value)) + value


def read_value(data: bytes, offset: int) -> tuple[SpopValue, int]:
    """Return (typed value, next offset); addresses come as their raw bytes. Raises ProtocolError."""
    if offset >= len(data):
        raise ProtocolError("a SPOP value is cut off")
    kind = data[offset] & 0x0F
    offset += 1
    if kind == 8 or kind == 9:
        return read_string(data, offset)
    if kind == 0:
        return None, offset
    if kind == 1:
        return bool(data[offset - 1] & 0x10), offset
    if kind <= 5:
        value, offset = read_varint(data, offset)
        is_signed = kind == 2 or kind == 4
        return (value - (1 << 64) if is_signed and value >= 1 << 63 else value), offset
    if kind <= 7:
        end = offset + (4 if kind == 6 else 16)
        if end > len(data):
            raise ProtocolError("a SPOP address is cut off")
        return data[offset:end], end
    raise ProtocolError(f"SPOP value type {kind} is not known")


def decode_frame(data: bytes) -> Frame:
    """Split one frame (without its 4 bytes of length). Raises ProtocolError."""
    if len(data) < 7:
        raise ProtocolError(f"a SPOP frame has {len(data)} bytes; at least 7 are needed")
    flags = data[4]  # the last of four bytes; the others have no meaning yet
    if not flags & _FLAG_FIN:
        raise ProtocolError("a SPOP frame is fragmented; that was never offered")
    stream_id, offset = read_varint(data, 5)
    frame_id, offset = read_varint(data, offset)
    return Frame(data[0], stream_id, frame_id, flags & _FLAG_ABORT != 0, data[offset:])


def decode_messages(payload: bytes) -> list[tuple[bytes, dict[bytes, SpopValue]]]:
    """Return a NOTIFY frame's messages as (name, arguments). Raises ProtocolError."""
    messages: list[tuple[bytes, dict[bytes, SpopValue]]] = []
    offset = 0
    while offset < len(payload):
        name, offset = read_string(payload, offset)
        if offset >= len(payload):
            raise ProtocolError("a SPOP message is cut off")
        arguments, offset = _read_arguments(payload, offset + 1, payload[offset])
        messages.append((name, arguments))
    return messages


def _read_arguments(payload: bytes, offset: int, num: int) -> tuple[dict[bytes, SpopValue], int]:
    """Return (arguments, next offset). Raises ProtocolError.

    What nearly every argument is, a short name with a string or with nothing, is read here: a call per name
    and per value is a third of the router's time for a frame.
    """
    size = len(payload)
    arguments: dict[bytes, SpopValue] = {}
    value: SpopValue
    try:
        for _ in range(num):
            at, length = offset + 1, payload[offset]
            if length >= 240:
                length, at = read_varint(payload, offset)
            end = at + length
            key, kind = payload[at:end], payload[end] & 0x0F
            if kind == 0:
                value, offset = None, end + 1
            elif kind == 8 or kind == 9:
                at, length = end + 2, payload[end + 1]
                if length >= 240:
                    length, at = read_varint(payload, end + 1)
                offset = at + length
                if offset > size:
                    raise ProtocolError(f"a SPOP string announces {length} bytes; {size - at} are left")
                value = payload[at:offset]
            else:
                value, offset = read_value(payload, end)
            arguments[key] = value
    except IndexError:
        raise ProtocolError("a SPOP argument is cut off") from None
    return arguments, offset


def decode_hello(payload: bytes) -> Hello:
    """Read HAPROXY-HELLO. Raises ProtocolError if HAProxy speaks no version 2 or its frames are too small."""
    items: dict[bytes, SpopValue] = {}
    offset = 0
    while offset < len(payload):
        key, offset = read_string(payload, offset)
        items[key], offset = read_value(payload, offset)
    versions = items.get(b"supported-versions")
    if not isinstance(versions, bytes) or not any(v.strip().startswith(b"2.") for v in versions.split(b",")):
        raise ProtocolError(f"HAProxy offers SPOP versions {versions!r}; 2.0 is needed")
    size = items.get(b"max-frame-size")
    if isinstance(size, bool) or not isinstance(size, int) or size < MIN_FRAME_BYTES:
        raise ProtocolError(f"HAProxy's max-frame-size is {size!r}; at least {MIN_FRAME_BYTES} is needed")
    return Hello(min(size, MAX_FRAME_BYTES), items.get(b"healthcheck") is True)


def encode_hello(max_frame_bytes: int) -> bytes:
    """Return the AGENT-HELLO frame: version 2.0, many frames in flight, answers in any order."""
    payload = (
        write_string(b"version")
        + _STRING
        + write_string(b"2.0")
        + write_string(b"max-frame-size")
        + _UINT32
        + write_varint(max_frame_bytes)
        + write_string(b"capabilities")
        + _STRING
        + write_string(b"pipelining")
    )
    return encode_frame(AGENT_HELLO, 0, 0, payload)


def encode_disconnect(status: int, message: bytes) -> bytes:
    """Return the AGENT-DISCONNECT frame. status: 0 normal, 4 invalid frame (SPOE.txt, 3.4)."""
    payload = (
        write_string(b"status-code")
        + _UINT32
        + write_varint(status)
        + write_string(b"message")
        + _STRING
        + write_string(message)
    )
    return encode_frame(AGENT_DISCONNECT, 0, 0, payload)


def encode_actions(variables: Mapping[bytes, bytes]) -> bytes:
    """Return the part of an ACK that sets string variables in the transaction's scope."""
    parts: list[bytes] = []
    for name, value in variables.items():
        parts += (_SET_VARIABLE_IN_TRANSACTION, write_string(name), _STRING, write_string(value))
    return b"".join(parts)


def encode_ack(stream_id: int, frame_id: int, actions: bytes) -> bytes:
    """Return the ACK frame with these actions (`encode_actions`)."""
    body = b"".join((_ACK_HEAD, write_varint(stream_id), write_varint(frame_id), actions))
    return len(body).to_bytes(4, "big") + body


def encode_frame(kind: int, stream_id: int, frame_id: int, payload: bytes) -> bytes:
    """Return one whole frame with its length in front."""
    body = bytes((kind,)) + _FIN + write_varint(stream_id) + write_varint(frame_id) + payload
    return len(body).to_bytes(4, "big") + body
