"""Heads of HTTP/2 messages: a request's fields checked, an answer's fields encoded.

Must not know frames, streams or sockets. Source: RFC 9113, 8.2 and 8.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.replica.http2_frames import ErrorCode, StreamError
from headrace.replica.http2_hpack import Field, encode_field, encode_status
from headrace.replica.http_messages import AnswerHeads

_PSEUDO = frozenset((":method", ":scheme", ":path", ":authority"))
_CONNECTION_FIELDS = frozenset(
    ("connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade")
)
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+")
_METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
_TARGET = re.compile(r"(?:/|\*$)[\x21-\x7e\x80-\xff]*")
_BAD_VALUE = re.compile(r"[\0\r\n]")
_LENGTH = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's head. Header names are lower case; of several equal names the last wins."""

    method: str
    target: str
    headers: dict[str, str]
    content_length: int | None


def read_head(fields: Sequence[Field]) -> RequestHead:
    """Check a request's fields. Raises StreamError if they are malformed."""
    pseudo: dict[str, str] = {}
    headers: dict[str, str] = {}
    for name, value in fields:
        if name[:1] == ":":
            if headers or name in pseudo or name not in _PSEUDO:
                raise _malformed(f"{name[:50]!r} is unknown, repeated, or stands behind a field")
            pseudo[name] = value
        else:
            headers[name] = value
    check_fields(fields)
    method, target = pseudo.get(":method", ""), pseudo.get(":path", "")
    if not pseudo.get(":scheme") or not _METHOD.fullmatch(method) or not _TARGET.fullmatch(target):
        raise _malformed("a request needs :method, :scheme and a :path that begins with /")
    if ":authority" in pseudo:
        headers["host"] = pseudo[":authority"]
    return RequestHead(method, target, headers, _content_length(fields))


def check_fields(fields: Sequence[Field]) -> None:
    """Raise StreamError for fields that HTTP/2 does not allow in requests or trailers."""
    for name, value in fields:
        if name[:1] != ":" and not _NAME.fullmatch(name):
            raise _malformed(f"a field is named {name[:50]!r}")
        if name in _CONNECTION_FIELDS or (name == "te" and value != "trailers"):
            raise _malformed(f"the field {name} belongs to HTTP/1.1")
        if _BAD_VALUE.search(value) or value != value.strip(" \t"):
            raise _malformed(f"the value of {name} has characters that are not allowed")


def _content_length(fields: Sequence[Field]) -> int | None:
    lengths = {value for name, value in fields if name == "content-length"}
    if not lengths:
        return None
    length = lengths.pop()
    if lengths or not _LENGTH.fullmatch(length):
        raise _malformed("content-length is not one number")
    return int(length)


def _malformed(message: str) -> StreamError:
    return StreamError(ErrorCode.PROTOCOL_ERROR, message)


class AnswerBlocks:
    """Encodes the heads of answers: the fields of `heads`, in HTTP/2's form."""

    def __init__(self, heads: AnswerHeads) -> None:
        self._heads = heads
        self._fixed = encode_lines(heads.fixed_headers)
        self._stream_type = encode_lines(
            "content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        )
        self._date = ""
        self._encoded_date = b""

    def whole(self, status: int, num_bytes: int, content_type: str, headers: str) -> bytes:
        """Return the header block of an answer of `num_bytes`."""
        return b"".join(
            (
                encode_status(status),
                self._date_field(),
                encode_field("content-type", content_type),
                encode_field("content-length", str(num_bytes)),
                self._fixed,
                encode_lines(headers),
            )
        )

    def stream(self, headers: str) -> bytes:
        """Return the header block of a stream of server-sent events."""
        return b"".join(
            (encode_status(200), self._date_field(), self._stream_type, self._fixed, encode_lines(headers))
        )

    def _date_field(self) -> bytes:
        date = self._heads.date()
        if date != self._date:
            self._date, self._encoded_date = date, encode_field("date", date)
        return self._encoded_date


def encode_lines(lines: str) -> bytes:
    """Encode `name: value\\r\\n` lines."""
    pairs = (line.partition(": ") for line in lines.split("\r\n") if line)
    return b"".join(encode_field(name.lower(), value) for name, _, value in pairs)
