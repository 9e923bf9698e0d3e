"""One JSON line per request. Never a prompt, never an answer.

Owns a thread that writes, so that a full pipe or a slow disk delays no stream; bounded: beyond the bound
lines are dropped, and the next line that fits says how many. Must not know what the lines mean.
"""

from __future__ import annotations

import queue
import threading
from typing import Any, BinaryIO, Protocol

import msgspec

_MAX_WAITING_LINES = 4096


class LineLog(Protocol):
    """Takes one line of named fields."""

    def write(self, fields: dict[str, Any]) -> None: ...


class AccessLog:
    """Writes lines to `stream` in the background, until closed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._encode = msgspec.json.Encoder().encode
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING_LINES)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write(self, fields: dict[str, Any]) -> None:
        """Queue one line. Never blocks."""
        if self._num_dropped:
            fields = {**fields, "dropped_lines": self._num_dropped}
        try:
            self._lines.put_nowait(self._encode(fields) + b"\n")
        except queue.Full:
            self._num_dropped += 1
        else:
            self._num_dropped = 0

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what is queued, for at most `timeout_s`."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):
                return  # nobody reads any more; put_nowait keeps the queue bounded
