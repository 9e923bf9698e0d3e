"""Server-sent events out of a byte stream that may be cut anywhere.

Owns the framing (WHATWG HTML, "Server-sent events"), as far as OpenAI servers use it: `data` fields, comments
and other fields skipped. Must not know what the data means.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 4 * 1024 * 1024


class EventTooLong(ValueError):
    """An event grew past MAX_EVENT_BYTES without an end."""


class EventParser:
    """Feed bytes in, get the data of each completed event out."""

    def __init__(self) -> None:
        self._pending = b""

    def __repr__(self) -> str:
        return f"<EventParser, {len(self._pending)} bytes pending>"

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of every event that `data` completes. Raises EventTooLong."""
        # Nearly always a piece is exactly one event: one comparison and one search instead of a split.
        if (
            not self._pending
            and data.startswith(b"data: ")
            and data.find(b"\n") == len(data) - 2
            and data.endswith(b"\n\n")
        ):
            return [data[6:-2]]
        return self._feed_slowly(data)

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of an event that has no end yet."""
        return len(self._pending)

    def _feed_slowly(self, data: bytes) -> list[bytes]:
        text = self._pending + data
        # A lone \r at the end may be half of \r\n: it waits.
        held = b"\r" if text.endswith(b"\r") else b""
        text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = text.split(b"\n\n")
        self._pending = rest + held
        if len(self._pending) > MAX_EVENT_BYTES:
            raise EventTooLong(f"an event has {len(self._pending)} bytes and no end yet")
        return [event for block in blocks if (event := _data_of(block)) is not None]


def _data_of(block: bytes) -> bytes | None:
    """Join the `data` fields of one event's lines; None when there are none (a comment, say)."""
    values = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
