"""Header compression: a decoder with its dynamic table, and the plain way to encode.

The encoder uses no table, so nothing of one answer depends on another. The decoder is bounded: by the bytes
it is given, by its table, and by the size of the list it returns. Must not know frames or what headers mean.
Source: RFC 7541.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from headrace.replica.http2_frames import ErrorCode, Http2Error
from headrace.replica.http2_huffman import decode_huffman

TABLE_BYTES: Final = 4096
"""Size of the dynamic table that we offer: the default."""
_ENTRY_BYTES: Final = 32
"""What an entry counts beside its name and value (RFC 7541, 4.1)."""
_MAX_INTEGER: Final = 1 << 28
_NAMES: Final = (
    ":authority", ":method", ":method", ":path", ":path", ":scheme", ":scheme", ":status", ":status",
    ":status", ":status", ":status", ":status", ":status", "accept-charset", "accept-encoding",
    "accept-language", "accept-ranges", "accept", "access-control-allow-origin", "age", "allow",
    "authorization", "cache-control", "content-disposition", "content-encoding", "content-language",
    "content-length", "content-location", "content-range", "content-type", "cookie", "date", "etag",
    "expect", "expires", "from", "host", "if-match", "if-modified-since", "if-none-match", "if-range",
    "if-unmodified-since", "last-modified", "link", "location", "max-forwards", "proxy-authenticate",
    "proxy-authorization", "range", "referer", "refresh", "retry-after", "server", "set-cookie",
    "strict-transport-security", "transfer-encoding", "user-agent", "vary", "via", "www-authenticate",
)  # fmt: skip
_VALUES: Final = {
    2: "GET", 3: "POST", 4: "/", 5: "/index.html", 6: "http", 7: "https", 8: "200", 9: "204", 10: "206",
    11: "304", 12: "400", 13: "404", 14: "500", 16: "gzip, deflate",
}  # fmt: skip
Field = tuple[str, str]
STATIC_TABLE: Final[tuple[Field, ...]] = tuple(
    (name, _VALUES.get(index, "")) for index, name in enumerate(_NAMES, 1)
)
"""Entry 1 is at index 0 (RFC 7541, appendix A)."""
_STATIC_INDEX: Final = {name: index for index, name in reversed(list(enumerate(_NAMES, 1)))}
_NUM_STATIC: Final = len(STATIC_TABLE)


class HpackDecoder:
    """Decodes the header blocks of one connection, in their order: all of them, also those to be ignored."""

    def __init__(self, max_list_bytes: int) -> None:
        self._max_list_bytes = max_list_bytes
        self._table: deque[Field] = deque()
        self.table_bytes = 0
        self._max_table_bytes = TABLE_BYTES

    def __repr__(self) -> str:
        return f"HpackDecoder({len(self._table)} entries, {self.table_bytes} bytes)"

    def decode(self, block: bytes) -> list[Field] | None:
        """Return the fields; None if they are more than `max_list_bytes`. Raises Http2Error."""
        try:
            return self._decode(block)
        except IndexError:
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, "a header block ends in a field") from None

    def _decode(self, block: bytes) -> list[Field] | None:
        fields: list[Field] = []
        num_bytes, at, end = 0, 0, len(block)
        while at < end:
            first = block[at]
            if first & 0x80:
                index, at = _read_integer(block, at, 0x7F)
                field = self._entry(index)
            elif first & 0x60 == 0x20:
                if fields or num_bytes:
                    raise Http2Error(ErrorCode.COMPRESSION_ERROR, "a table size stands behind a field")
                size, at = _read_integer(block, at, 0x1F)
                self._resize(size)
                continue
            else:
                index, at = _read_integer(block, at, 0x3F if first & 0x40 else 0x0F)
                if index:
                    name = self._entry(index)[0]
                else:
                    name, at = _read_string(block, at)
                value, at = _read_string(block, at)
                field = (name, value)
                if first & 0x40:
                    self._add(field)
            num_bytes += len(field[0]) + len(field[1]) + _ENTRY_BYTES
            if num_bytes <= self._max_list_bytes:
                fields.append(field)
        return fields if num_bytes <= self._max_list_bytes else None

    def _entry(self, index: int) -> Field:
        if 0 < index <= _NUM_STATIC:
            return STATIC_TABLE[index - 1]
        if not 0 < index - _NUM_STATIC <= len(self._table):
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, f"there is no table entry {index}")
        return self._table[index - _NUM_STATIC - 1]

    def _add(self, field: Field) -> None:
        size = len(field[0]) + len(field[1]) + _ENTRY_BYTES
        self._shrink(self._max_table_bytes - size)
        if size <= self._max_table_bytes:
            self._table.appendleft(field)
            self.table_bytes += size

    def _resize(self, num_bytes: int) -> None:
        if num_bytes > TABLE_BYTES:
            raise Http2Error(
                ErrorCode.COMPRESSION_ERROR,
                f"a table of {num_bytes} bytes; at most {TABLE_BYTES} are offered",
            )
        self._max_table_bytes = num_bytes
        self._shrink(num_bytes)

    def _shrink(self, num_bytes: int) -> None:
        while self._table and self.table_bytes > num_bytes:
            name, value = self._table.pop()
            self.table_bytes -= len(name) + len(value) + _ENTRY_BYTES


def _read_integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Return the number that begins in the byte at `at`, and where it ends. Raises IndexError, Http2Error."""
    number = block[at] & mask
    at += 1
    if number < mask:
        return number, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        number += (byte & 0x7F) << shift
        shift += 7
        if number > _MAX_INTEGER or shift > 35:
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, "a number in a header block is too large")
        if byte < 0x80:
            return number, at


def _read_string(block: bytes, at: int) -> tuple[str, int]:
    """Return the string at `at`, and where it ends. Raises IndexError, Http2Error."""
    is_huffman = block[at] & 0x80
    length, at = _read_integer(block, at, 0x7F)
    end = at + length
    if end > len(block):
        raise IndexError
    data = block[at:end]
    return (decode_huffman(data) if is_huffman else data).decode("latin-1"), end


def encode_field(name: str, value: str) -> bytes:
    """Return one field that no table remembers. `name` in lower case."""
    index = _STATIC_INDEX.get(name)
    text = value.encode("latin-1")
    if index is not None:
        return _encode_integer(index, 0x0F, 0x00) + _encode_integer(len(text), 0x7F, 0x00) + text
    key = name.encode("latin-1")
    return (
        b"\x00" + _encode_integer(len(key), 0x7F, 0x00) + key + _encode_integer(len(text), 0x7F, 0x00) + text
    )


def encode_status(status: int) -> bytes:
    """Return the field `:status`."""
    value = str(status)
    for index in range(8, 15):
        if _VALUES[index] == value:
            return bytes((0x80 | index,))
    return encode_field(":status", value)


def _encode_integer(number: int, mask: int, first: int) -> bytes:
    if number < mask:
        return bytes((first | number,))
    encoded = bytearray((first | mask,))
    number -= mask
    while number >= 0x80:
        encoded.append(0x80 | number & 0x7F)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
