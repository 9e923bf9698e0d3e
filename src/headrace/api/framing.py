"""Frames on a stream socket: 4 bytes of big-endian length, then one msgpack message.

Must not know: sockets, or which messages a channel carries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from headrace.errors import ProtocolError

MessageT = TypeVar("MessageT")
MAX_FRAME_BYTES = 64 * 1024 * 1024
FRAME_HEADER_BYTES = 4
_encoder = msgspec.msgpack.Encoder()
_building = threading.Lock()
"""Threads that make decoders of the same structs at once, for the first time, can crash (msgspec 0.22)."""


def encode_frame(message: Any) -> bytes:
    """Return `message` as one frame."""
    frame = bytearray(FRAME_HEADER_BYTES)
    _encoder.encode_into(message, frame, FRAME_HEADER_BYTES)
    frame[:FRAME_HEADER_BYTES] = (len(frame) - FRAME_HEADER_BYTES).to_bytes(FRAME_HEADER_BYTES, "big")
    return bytes(frame)


class FrameDecoder(Generic[MessageT]):
    """Turns received bytes into messages of one type (a struct or a union of tagged structs).

    Raises ProtocolError on a frame that is too long or not of that type; the connection must then be closed.
    """

    def __init__(self, message_type: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        with _building:
            self._decoder = msgspec.msgpack.Decoder(message_type)
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[MessageT]:
        """Add received bytes; yield every message that is complete."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= FRAME_HEADER_BYTES:
                length = int.from_bytes(buffer[start : start + FRAME_HEADER_BYTES], "big")
                if length > self._max_frame_bytes:
                    raise ProtocolError(
                        f"a frame announces {length} bytes; at most {self._max_frame_bytes} are allowed"
                    )
                end = start + FRAME_HEADER_BYTES + length
                if len(buffer) < end:
                    break
                payload = bytes(buffer[start + FRAME_HEADER_BYTES : end])
                start = end
                yield self._decode(payload)
        finally:
            del buffer[:start]

    def _decode(self, payload: bytes) -> MessageT:
        try:
            message: MessageT = self._decoder.decode(payload)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ProtocolError(f"a frame of {len(payload)} bytes is not a message: {error}") from error
        return message
